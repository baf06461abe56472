"""Bodies of requests and replies, as pydantic models: they check what comes in and describe both in the
OpenAPI document.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from serve.errors import ErrorCode

_DATA_URI = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLv"
    "AAAAAElFTkSuQmCC"
)
_TEXT = {
    "type": "string",
    "minLength": 1,
    "description": "A text, not empty and no longer than the model's context.",
}
_ITEM = {
    "anyOf": [
        _TEXT,
        {
            "type": "object",
            "properties": {"text": _TEXT},
            "required": ["text"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {
                "image": {
                    "type": "string",
                    "description": "A JPEG, PNG or WebP image as a data URI or base64.",
                }
            },
            "required": ["image"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {
                "image_url": {
                    "type": "string",
                    "description": "An https or http URL on a host that the server allows, or a data URI.",
                }
            },
            "required": ["image_url"],
            "additionalProperties": False,
        },
    ]
}
Inputs = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [*_ITEM["anyOf"], {"type": "array", "items": _ITEM, "minItems": 1}],
            "description": "One input, or a list mixing texts and images in any order.",
        }
    ),
]
Texts = Annotated[Any, WithJsonSchema({"type": "array", "items": _TEXT, "minItems": 1})]
Images = Annotated[
    Any,
    WithJsonSchema(
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "anyOf": [
                    {"type": "string", "minLength": 1, "description": "A data URI or base64."},
                    *_ITEM["anyOf"][2:],
                ]
            },
        }
    ),
]
Labels = Annotated[
    Any,
    WithJsonSchema(
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "uniqueItems": True}
    ),
]
Templates = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "enum": ["openai", "simple"]},
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "string",
                        "pattern": r"^[^{}]*\{c?\}[^{}]*$",
                        "description": "{} is the label.",
                    },
                },
                {"type": "null"},
            ],
            "description": "Prompt templates; their vectors are averaged. Left out: a photo of a {}.",
        }
    ),
]
Modality = Literal["text", "image"]


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class EmbeddingsRequest(Request):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "demo", "input": "a red circle"},
                {
                    "model": "demo",
                    "input": [{"text": "a red circle"}, {"image": _DATA_URI}],
                    "encoding_format": "base64",
                },
            ]
        }
    )
    model: str
    """Id of a served model; GET /v1/models lists them."""
    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"
    """base64: little-endian float32."""
    dimensions: int | None = Field(default=None, ge=1)
    """Shorter vectors, from models that were trained for it."""
    truncate: bool = False
    """Cut texts that are longer than the model's context; the reply names them. Otherwise they are refused.
    """
    modality: Modality = "text"
    """What plain strings of the input are: texts, or images as data URIs."""
    user: str | None = None
    """Accepted as OpenAI's clients send it, and not used."""


class ClassifyRequest(Request):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"inputs": [{"image": _DATA_URI}], "labels": ["cat", "dog"]},
                {"inputs": [{"image": _DATA_URI}], "label_set": "pets", "top_k": 1, "abstain_below": 0.5},
            ]
        }
    )
    model: str | None = None
    """Id of a served model; left out: the first."""
    inputs: Inputs
    labels: Labels = None
    """Labels to choose from. Give either labels or label_set."""
    label_set: str | None = None
    """Id of a registered label set."""
    templates: Templates = None
    top_k: int = Field(default=5, ge=1)
    """Most predictions for each input. A reply holds at most 100,000: inputs times the smaller of this and
    the number of labels.
    """
    multi_label: bool = False
    """Probability of each label by itself instead of one distribution over them."""
    abstain_below: float | None = Field(default=None, ge=0, le=1)
    """Mark inputs whose best label is less probable than this."""
    truncate: bool = False
    """Cut input texts that are longer than the model's context."""
    modality: Modality = "text"
    """What plain strings of the inputs are."""
    user: str | None = None
    """Accepted and not used."""


class SimilarityRequest(Request):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"texts": ["a red circle", "a blue square"], "images": [_DATA_URI]}]}
    )
    model: str | None = None
    """Id of a served model; left out: the first."""
    texts: Texts
    images: Images
    truncate: bool = False
    """Cut texts that are longer than the model's context."""
    user: str | None = None
    """Accepted and not used."""


class LabelSetRequest(Request):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"labels": ["cat", "dog"], "templates": ["a photo of a {}, a pet"]}]}
    )
    labels: Labels
    templates: Templates = None


class ReloadRequest(Request):
    model: str | None = None
    """Id of a served model; left out: the first."""


class Usage(BaseModel):
    prompt_tokens: int
    """Tokens of all texts, start and end included. Images count nothing."""
    total_tokens: int


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """Numbers, or base64 of little-endian float32."""


class EmbeddingsReply(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    fingerprint: str
    """Changes exactly when the same input would give another vector."""
    usage: Usage
    truncated: list[int]
    """Indices of texts that were cut."""


class LabelPrediction(BaseModel):
    label: str
    probability: float
    logit: float
    """Scaled cosine, plus the model's bias where it has one."""


class Classification(BaseModel):
    index: int
    predictions: list[LabelPrediction]
    abstained: bool


class ClassifyReply(BaseModel):
    object: Literal["list"]
    data: list[Classification]
    model: str
    fingerprint: str
    usage: Usage
    truncated: list[int]


class SimilarityReply(BaseModel):
    object: Literal["list"]
    data: list[list[float]]
    """A row for each text, a column for each image: cosines."""
    model: str
    fingerprint: str
    usage: Usage
    truncated: list[int]


class LabelSetReply(BaseModel):
    id: str
    object: Literal["label_set"]
    labels: list[str]
    templates: list[str]


class LabelSetList(BaseModel):
    object: Literal["list"]
    data: list[LabelSetReply]


class Deleted(BaseModel):
    id: str
    object: Literal["label_set"]
    deleted: Literal[True]


class GateReply(BaseModel):
    image: float
    text: float


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    """Unix time at which this version began to answer."""
    owned_by: str
    fingerprint: str
    dimensions: int
    nested_dimensions: list[int]
    """Values that the dimensions of an embeddings request may have besides."""
    context_length: int
    image_size: list[int]
    """Height and width that images are brought to, in pixels."""
    probabilities: Literal["softmax", "sigmoid"]
    engine: str
    device: str
    dtype: str
    parameters: int
    gate: GateReply | None
    """Least centred cosine of this engine's vectors to the reference, found at start."""


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Reloaded(BaseModel):
    model: str
    fingerprint: str
    previous_fingerprint: str
    changed: bool


class Health(BaseModel):
    status: Literal["ok"]


class GallerySize(BaseModel):
    count: int


class GallerySearch(Request):
    text: str
    model: str | None = None
    top_k: int = Field(default=8, ge=1, le=50)


class GalleryHit(BaseModel):
    name: str
    similarity: float
    thumbnail: str


class GalleryReply(BaseModel):
    data: list[GalleryHit]
    model: str
    fingerprint: str


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    """The part of the request that is wrong, such as input[3]."""
    code: ErrorCode


class ErrorReply(BaseModel):
    error: ErrorBody
    request_id: str
