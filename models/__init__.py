"""Flax models that keep K and V in a `KVCache`, their checkpoints and tokenizers."""

from .checkpoint import NAMES as NAMES
from .checkpoint import LoadedModel as LoadedModel
from .checkpoint import load as load
from .config import LlamaConfig as LlamaConfig
from .errors import ModelError as ModelError
from .llama import Llama as Llama
from .tokenizer import StreamDecoder as StreamDecoder
from .tokenizer import Tokenizer as Tokenizer
