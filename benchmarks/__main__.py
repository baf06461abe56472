"""`make bench`: the benchmarks that need no GPU, no photos and no other environment, one after the other."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CPU_SET = (
    ("loss.py", "--sizes", "4096", "8192", "--rounds", "5"),
    ("data.py", "--only", "reading", "order"),
    ("retrieval.py", "--rounds", "3", "--tiled", "0"),
    ("checkpoint.py", "--repeats", "3"),
)


def main() -> int:
    failed = []
    for script, *arguments in CPU_SET:
        print(f"\n==== {script} {' '.join(arguments)}", flush=True)
        if subprocess.call([sys.executable, str(HERE / script), *arguments]) != 0:
            failed.append(script)
    print("\nbuild.py and the rest of data.py need photos, serve.py its peers: see docs/benchmarks.md")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
