# x86-64 and aarch64 (GH200): docker buildx build --platform linux/amd64,linux/arm64 -t egom2p .
# NVIDIA's image brings its own torch and torchvision; the floors in req.txt leave them in place.
# Attention on CUDA is torch.nn.attention.varlen, of torch 2.10; an image without it fails here and not in a job.
FROM nvcr.io/nvidia/pytorch:26.01-py3
RUN python -c "import torch, torch.nn.attention.varlen; print(torch.__version__)"
WORKDIR /workspace/egom2p
COPY req.txt setup.py README.md ./
RUN grep -vE '^(torch|torchvision)\b' req.txt > /tmp/req.txt && pip install --no-cache-dir -r /tmp/req.txt
COPY . .
RUN pip install --no-cache-dir --no-deps --editable .
ENTRYPOINT ["egom2p"]
