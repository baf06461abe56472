"""The LitServe side of benchmarks/serve.py: its documented batching API around the same open_clip model.

    python serve_litserve.py MODEL_FOLDER PORT

Annotations stay objects here: LitServe reads them to find the request's type.
"""

import base64
import io
import sys

import litserve
import open_clip
import torch
from PIL import Image


class Embed(litserve.LitAPI):
    def setup(self, device: str) -> None:
        model, _, self.transform = open_clip.create_model_and_transforms(f"local-dir:{sys.argv[1]}")
        self.model = model.to(device).eval()
        self.tokenizer = open_clip.get_tokenizer(f"local-dir:{sys.argv[1]}")

    def decode_request(self, request: dict) -> tuple[str, torch.Tensor]:
        if "text" in request:
            return "text", self.tokenizer([request["text"]])[0]
        data = base64.b64decode(request["image"].partition(",")[2])
        return "image", self.transform(Image.open(io.BytesIO(data)))

    def batch(self, inputs: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        return inputs

    def unbatch(self, output: list[torch.Tensor]) -> list[torch.Tensor]:
        return output

    @torch.inference_mode()
    def predict(self, inputs: list[tuple[str, torch.Tensor]]) -> list[torch.Tensor]:
        rows: list[torch.Tensor | None] = [None] * len(inputs)
        for kind, encode in (("image", self.model.encode_image), ("text", self.model.encode_text)):
            which = [index for index, entry in enumerate(inputs) if entry[0] == kind]
            if which:
                features = encode(torch.stack([inputs[i][1] for i in which]), normalize=True)
                for index, row in zip(which, features, strict=True):
                    rows[index] = row
        return [row for row in rows if row is not None]

    def encode_response(self, output: torch.Tensor) -> dict[str, str]:
        return {"embedding": base64.b64encode(output.numpy().astype("<f4").tobytes()).decode()}


if __name__ == "__main__":
    api = Embed(max_batch_size=32, batch_timeout=0.005)
    litserve.LitServer(api, accelerator="cpu", timeout=60).run(
        port=int(sys.argv[2]), host="127.0.0.1", generate_client_file=False, log_level="warning"
    )
