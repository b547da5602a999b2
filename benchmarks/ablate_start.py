"""What makes a short training use its video: the start of the token tables, at equal steps.

    python benchmarks/ablate_start.py [--data runs/quickstart] [--steps 400]

Trains the quickstart's model three times on the quickstart's tokens (same data order, masks, steps and seed) and
measures all three on its test clips: (a) released start, token tables normal(0.02); (b) normal(0.7), the size of the
position table; (c) (b) started from the tokenizers' code vectors. Each figure stands beside the strongest trivial
prediction and the control with inputs from another clip.
"""

import argparse
import shutil
from pathlib import Path

from benchmarks.printing import heading, say
from egom2p.config import load
from egom2p.evaluation.run import evaluate
from egom2p.generation.schedule import TargetArgs
from egom2p.model.egom2p import EgoM2P
from egom2p.training.pretraining import PretrainConfig, pretrain

VARIANTS = {"normal(0.02), released": ["init.codes=false", "model.embedding_std=0.02"],
            "normal(0.7)": ["init.codes=false", "model.embedding_std=0.7"],
            "from codes, 0.7": ["init.codes=true", "model.embedding_std=0.7"]}
MAIN = {"rgb2cam": "ate_m", "rgb2gaze": "gaze_mse", "rgb2depth": "abs_rel"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    heading(__doc__, steps=args.steps)
    say(f"{'start of token tables':24} " + " ".join(f"{t + ' ' + m:>20} {'shuffled':>9}" for t, m in MAIN.items()))
    for name, overrides in VARIANTS.items():
        run = args.data / "ablate_start" / name.split(",")[0].replace(" ", "_")
        shutil.rmtree(run, ignore_errors=True)
        tokenizers = [f"modalities.{n}.tokenizer={args.data}/tokenizers/{n}" for n in ("rgb", "depth", "cam", "gaze")]
        pretrain(load(PretrainConfig, "cfgs/train/quickstart.yaml",
                      [f"run.dir={run}", f"data.root={args.data}/tokens", f"train.steps={args.steps}",
                                                                    "eval.every=0", "checkpoint.every=0", *tokenizers,
                                                                    *overrides]))
        recipes = {n: TargetArgs(expected=True) for n in ("cam", "gaze", "depth")}
        summary = evaluate(EgoM2P.from_pretrained(run), MAIN, f"{args.data}/clips/test/*.tar", recipes).summary
        figures = [f"{summary[t][m]['value']:20.4f} {summary[t][m]['shuffled']:9.4f}" for t, m in MAIN.items()]
        say(f"{name:24} " + " ".join(figures))
    say(f"{'strongest trivial':24} " + " ".join(f"{summary[t][m]['baseline']:20.4f} {'':9}" for t, m in MAIN.items()))


if __name__ == "__main__":
    main()
