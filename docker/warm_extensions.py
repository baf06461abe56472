"""Compiles extensions of DeepSpeed into TORCH_EXTENSIONS_DIR: a script that asks for one finds it made.

python docker/warm_extensions.py ShareMemCommBuilder
"""

import os
import sys
from pathlib import Path

from deepspeed.accelerator import get_accelerator


def main(builders: list[str]) -> int:
    """Names of DeepSpeed's op builders -> exit status; raises what the compiler's failure raises."""
    for name in builders:
        builder = get_accelerator().create_op_builder(name)
        if builder is None:
            print(f"{name}: no op builder of DeepSpeed on this accelerator", file=sys.stderr)
            return 1
        builder.load(verbose=False)
        print(f"{name}: compiled as {builder.name}")
    cut_times(Path(os.environ["TORCH_EXTENSIONS_DIR"]))
    return 0


def cut_times(folder: Path) -> None:
    """To whole seconds, downwards.

    Layers of images may hold no others. A builder that rounds up makes an object newer than ninja's record of
    it, which ninja takes for a reason to compile it again.
    """
    for path in folder.rglob("*"):
        time_s = int(path.stat().st_mtime)
        os.utime(path, (time_s, time_s))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
