"""Whether a grammar is right, found by compiling it here, before anything is generated.

Offline callers wait for it and harm nobody else; over HTTP a process that can be killed does it
(`http.grammars`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from jaxserve.config import StructuredConfig
from jaxserve.errors import ConfigError, GrammarError
from jaxserve.text.asked_grammar import Wanted
from jaxserve.types import ModelInfo, Vocabulary

if TYPE_CHECKING:
    from jaxserve.structured.compiler import Compiler


class Trial:
    """Compiles grammars for one model; nothing is made before the first.

    Args:
        vocabulary: makes what the model's tokens say.
    """

    def __init__(
        self, config: StructuredConfig, model: ModelInfo, vocabulary: Callable[[], Vocabulary]
    ) -> None:
        self._config = config
        self._model = model
        self._vocabulary = vocabulary
        self._compiler: Compiler | None = None

    def check(self, wanted: Wanted) -> None:
        """Returns where a grammar is right.

        Raises:
            GrammarError: it is wrong; names the parameter that it comes from.
            ConfigError: llguidance is not installed.
        """
        try:  # the library, once it is needed
            from jaxserve.structured.compiler import Compiler
            from jaxserve.structured.probe import probe
            from jaxserve.structured.scrutiny import scrutinise
        except ImportError as error:
            raise ConfigError(f"structured output needs llguidance: {error}") from error
        if self._compiler is None:
            self._compiler = Compiler(self._config, self._model)
            self._compiler.use(self._vocabulary())
        try:
            scrutinise(wanted.grammar, self._config.max_properties)
            probe(self._compiler.start(wanted.grammar).result(), self._model.vocab_size)
        except GrammarError as error:
            message = f"{wanted.param}: {error.message}"
            raise GrammarError(message, param=wanted.param) from None
