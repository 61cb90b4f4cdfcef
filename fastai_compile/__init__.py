"Export any fastai Learner as one verified, compiled file"
__version__ = "0.1.0"

from fastai_compile.artifact import inspect_artifact
from fastai_compile import text as _text  # noqa: F401 - registers its rewrite
from fastai_compile.backends import inductor as _inductor, onnxruntime as _onnxruntime  # noqa: F401 - register themselves
from fastai_compile.backends.base import available_backends, register_backend
from fastai_compile.config import CompileConfig
from fastai_compile.errors import (ArtifactError, BackendError, BackendUnavailable, CaptureError, CompileError,
                                   ConfigError, ExampleError, FallbackError, HostMismatch, InputError, MissingDefinition,
                                   NotTrainable, RandomTransformError, VerificationError, WriteError)
from fastai_compile.example import example_batch
from fastai_compile.learner import open_learner
from fastai_compile.model import CompiledModel
from fastai_compile.report import Report

__all__ = ["ArtifactError", "BackendError", "BackendUnavailable", "CaptureError", "CompileConfig", "CompileError",
           "CompiledModel", "ConfigError", "ExampleError", "FallbackError", "HostMismatch", "InputError",
           "MissingDefinition", "NotTrainable", "RandomTransformError", "Report", "VerificationError", "WriteError",
           "available_backends", "example_batch", "inspect_artifact", "open_learner", "register_backend"]
