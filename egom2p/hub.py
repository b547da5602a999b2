"""`egom2p push` and `push-data`: models with tokenizers and a card, clips and token shards, to the Hugging Face Hub.

What is uploaded is what `egom2p export` writes, so `EgoM2P.from_pretrained("OWNER/NAME")` decodes on the other side.
"""

import os
import tempfile
from pathlib import Path

from egom2p import __version__
from egom2p.config import read_json, read_yaml
from egom2p.data.clips import expand_paths
from egom2p.data.tarindex import INDEX_FILE, index_tars
from egom2p.errors import UserError
from egom2p.evaluation.measures import VARIANT
from egom2p.export import upload
from egom2p.generation.bundle import export_bundle
from egom2p.model.egom2p import EgoM2P
from egom2p.training.log import HELD_OUT, last_figures, read_metrics

NOTES = ("encode.json", "card.json", "contact_sheet.png", INDEX_FILE)


def push_model(source: str, repo: str, private: bool, licence: str) -> str:
    """Upload a run or export with its tokenizers and a model card; returns the address."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "export"
        export_bundle(source, folder)
        (folder / "README.md").write_text(model_card(source, repo, licence))
        return upload(folder, repo, private)


def model_card(source: str, repo: str, licence: str) -> str:
    """What a stranger must know, from the run's configuration, its log and the results of its evaluation."""
    model, folder = EgoM2P.from_pretrained(source), Path(source)
    rows = "\n".join(f"| {m.name} | {m.signal} | {' x '.join(map(str, m.grid))} | {m.vocab_size} | "
                     f"{'input and target' if m.target else 'input only'} |" for m in model.modalities)
    parameters = sum(p.numel() for p in model.parameters())
    names = [m.name for m in model.modalities]
    return f"""---
license: {licence}
library_name: egom2p
tags: [egocentric-vision, masked-modeling, multimodal]
---
# {repo.partition('/')[2]}

A masked transformer over the tokens of aligned egocentric streams ({', '.join(names)}), {parameters / 1e6:.1f} M
parameters, made with EgoM2P {__version__}. Any of them is predicted from any other.

| modality | signal | tokens of 2 s | ids | |
|---|---|---|---|---|
{rows}

## Use

```python
from egom2p import EgoM2P, Pipeline
pipeline = Pipeline(EgoM2P.from_pretrained("{repo}"))
predicted = pipeline("my_video.mp4", targets={[n for n in names if n != names[0]][:3]})
```

Its tokenizers are in the subfolders `tokenizers/NAME`.

## Training

{_training(folder)}

## Results

{_results(folder, model.fingerprint())}

## Limits

Predicted depth is relative inverse depth, without a scale. Poses are relative to the first camera of a 2-second window,
in metres as the training data had them. Nothing is known of recordings unlike the training data: evaluate on your own
before you rely on it.
"""


def _training(folder: Path) -> str:
    """Data, steps and losses of a run; what can be said of an export."""
    if not (folder / "config.yaml").exists():
        return "Not on record: this was pushed from an export, not from a run."
    config, rows = read_yaml(folder / "config.yaml"), read_metrics(folder)
    sets = ", ".join(f"{name} (weight {entry.get('weight', 1.0):g})" for name, entry in config.data.datasets.items())
    step = max((r["step"] for r in rows), default=0)
    held_out = {k: v for k, v in last_figures(rows).items() if k.startswith(HELD_OUT)}
    losses = ", ".join(f"{name.removeprefix(HELD_OUT)} {loss:.3f}" for name, loss in held_out.items())
    return (f"Data sets: {sets}. {step} steps of {config.train.batch_size} samples."
            + (f" Held-out cross-entropy, nats a token: {losses}." if losses else ""))


def _results(folder: Path, weights: str) -> str:
    """The table of `RUN/eval/results.json`, or of the quickstart the run belongs to, if it is of these weights."""
    places = (folder / "eval/results.json", folder.parent / "results.json")
    found = next((p for p in places if p.exists()
                  and read_json(p).get("about", {}).get("weights", weights) == weights), None)
    if found is None:
        return f"These weights were not evaluated yet: `egom2p eval {folder} --tasks ... --data ...`."
    lines = ["| task | metric | model | 95 % | strongest trivial | inputs shuffled | tokenizer's own |",
             "|---|---|---|---|---|---|---|"]
    for task, metrics in read_json(found).items():
        for metric, f in metrics.items() if isinstance(metrics, dict) else ():
            if isinstance(f, dict) and "value" in f and VARIANT not in metric:
                low, high = f["ci95"]
                lines.append(f"| {task} | {metric} | {f['value']:.4f} | {low:.4f} to {high:.4f} | {f['baseline']:.4f} "
                             f"({f['baseline_name']}) | {f['shuffled']:.4f} | {f['ceiling']:.4f} |")
    return "\n".join(lines)


def push_data(pattern: str, repo: str, private: bool, licence: str) -> str:
    """Upload the tars of a pattern and the notes beside them, at their paths below the folder all have in common;
    returns the address. Raises UserError for damaged tars."""
    tars = [p for p in expand_paths(pattern) if p.suffix == ".tar"]
    if not tars:
        raise UserError(f"{pattern}: no tar there")
    entries = index_tars(tars)
    if damaged := [e for e in entries if e.damage]:
        raise UserError(f"{damaged[0].path}: {damaged[0].damage}; mend or remove it first, nothing was uploaded")
    folders = [Path(os.path.abspath(p.parent)) for p in tars]
    are_tokens = all(suffix in ("npy", "npz") for entry in entries for suffix in entry.suffixes)
    # Token shards keep the two folders that `data.root` is above, ROOT/MODALITY/DATASET, also where all are of one.
    root = os.path.commonpath([(folder, *folder.parents)[:3][-1] if are_tokens else folder for folder in folders])
    depth = max(len(folder.relative_to(root).parts) for folder in folders)
    use = f"root: \"hf://datasets/{repo}\"" if are_tokens else f"clips: \"hf://datasets/{repo}{'/*' * depth}/*.tar\""
    notes = {folder / name for folder in {p.parent for p in tars} for name in NOTES if (folder / name).exists()}
    with tempfile.TemporaryDirectory() as place:
        for path in [*tars, *sorted(notes)]:
            target = Path(place) / os.path.relpath(os.path.abspath(path), root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path.resolve())
        files = sum(len(e.keys) for e in entries)
        (Path(place) / "README.md").write_text(
            f"---\nlicense: {licence}\ntags: [egocentric-vision, webdataset]\n---\n# {repo.partition('/')[2]}\n\n"
            f"{len(tars)} WebDataset tars with {files} files, made with EgoM2P {__version__}. In a training "
            f"configuration:\n\n```yaml\ndata: {{{use}}}\n```\n")
        return upload(Path(place), repo, private, "dataset")
