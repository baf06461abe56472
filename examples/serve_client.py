"""Classify a photo with the bundled client:  python examples/serve_client.py PHOTO LABEL... [--url URL]"""

import argparse
import os
from pathlib import Path

from serve.client import Client

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("photo", type=Path)
parser.add_argument("labels", nargs="+")
parser.add_argument("--url", default="http://127.0.0.1:8000")
args = parser.parse_args()
if not args.photo.is_file():
    parser.exit(2, f"{args.photo}: no such file\n")

with Client(args.url, token=os.environ.get("CLIPSTACK_TOKEN")) as client:
    (answer,) = client.classify([args.photo], labels=args.labels)
for prediction in answer.predictions:
    print(f"{prediction.probability:6.1%}  {prediction.label}")
