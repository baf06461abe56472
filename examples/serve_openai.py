"""Text embeddings with OpenAI's own client:  python examples/serve_openai.py [URL] [MODEL]"""

import os
import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("CLIPSTACK_TOKEN", "none"))
model = sys.argv[2] if len(sys.argv) > 2 else client.models.list().data[0].id

reply = client.embeddings.create(model=model, input=["a red circle", "a blue square"])
print(model, len(reply.data), "vectors of", len(reply.data[0].embedding), "dimensions")
