"""open_clip's own trainer, started in its own environment with a model config of ours added; nothing else is
changed.

    PEER_PYTHON -P benchmarks/train_open_clip.py MODEL_CONFIG.json --model NAME ...

The peer's environment: `open_clip_torch==3.3.0 webdataset==0.2.86 transformers pandas`, with the torch and
torchvision of `constraints.txt`. What is measured is `open_clip_train.main`, as it was installed. Two things
come before it: `open_clip.add_model_config`, its documented way to name a new architecture, and, where torch
is a CPU build, the two operator names without which a CUDA build of torchvision cannot be imported.
"""

import importlib.util
import sys
from pathlib import Path

COMPAT = Path(__file__).resolve().parents[1] / "clipstack" / "torchvision_compat.py"


def declare_operators() -> None:
    """Run our stand-in for torchvision's operators, which needs torch alone."""
    spec = importlib.util.spec_from_file_location("torchvision_compat", COMPAT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # the declarations live as long as the module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    declare_operators()
    import open_clip
    from open_clip_train.main import main

    model_config, *arguments = sys.argv[1:]
    open_clip.add_model_config(model_config)
    sys.exit(main(arguments))
