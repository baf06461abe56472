"""Compiles extensions of DeepSpeed into TORCH_EXTENSIONS_DIR: a script that asks for one finds it made.

python docker/warm_extensions.py ShareMemCommBuilder
"""

import sys

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
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
