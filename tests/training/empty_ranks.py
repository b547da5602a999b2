"""torchrun --nproc-per-node 2 -m tests.training.empty_ranks MODE: one rank's micro-batch lacks everything, its inputs
or its targets. Prints `ok: CASE` when both ranks end with the gradients of the two packs together."""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from egom2p.data.batch import pack
from egom2p.distributed import World
from egom2p.model.egom2p import EgoM2P, ModelArgs
from egom2p.training.parallel import full_tensor, spread
from tests.model.test_attention import MODALITIES, sample

FULL = [sample(0, (5, 3, 0), (0, 4, 6), 0), sample(1, (0, 0, 2), (7, 0, 0), 1)]
CASES = {"nothing": [], "no inputs": [sample(2, (0, 0, 0), (3, 2, 0), 2)],
         "no targets": [sample(2, (3, 0, 2), (0, 0, 0), 2)]}


def gradients(samples: list, forward: torch.nn.Module, model: EgoM2P) -> dict[str, torch.Tensor]:
    batch = pack(samples, len(MODALITIES))
    loss, _ = forward(batch, torch.ones(len(batch.targets), dtype=torch.float64))
    loss.backward()
    return {name: full_tensor(p.grad) for name, p in model.named_parameters()}


def make_model() -> EgoM2P:
    torch.manual_seed(0)
    return EgoM2P(MODALITIES, ModelArgs(24, 4, 1, 1, variant="swiglu_qknorm")).double()


def main(mode: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    world = World(dist.get_rank(), 2, dist.get_rank(), torch.device("cpu"))
    for case, lacking in CASES.items():
        alone, model = make_model(), make_model()
        wanted = gradients(FULL + lacking, alone, alone)
        made = gradients(FULL if world.rank == 0 else lacking, spread(model, mode, world), model)
        for name, gradient in wanted.items():
            torch.testing.assert_close(2 * made[name], gradient, rtol=1e-9, atol=1e-12,
                                       msg=lambda m, c=case, n=name: f"{c}: {n}: {m}")
        dist.barrier()
        if world.is_main:
            print(f"ok: {case}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
