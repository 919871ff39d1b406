"""The configs of the Hyena models, with the keys that their checkpoints have."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class HyenaDNAConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is untyped here
    """HyenaDNA as its Hugging Face checkpoints state it (Nguyen et al. 2023, arXiv:2306.15794).

    `filter_order` is the width of the network that makes the filters, `emb_dim` the features of a position that it
    reads, `activation_freq` where the frequencies of its sines start; `max_seq_len` how many positions it knows.
    `modulation_shift` is added to the decay that the network's output is multiplied by. `vocab_size` becomes a
    multiple of `pad_vocab_size_multiple`. `modal` is there when the filters were distilled: the most `entries` of a
    filter and the most real `states`, a number for each layer, and the taps of the `fir_head` (0 for none).
    """

    model_type = "hyenadna"
    attribute_map = {  # noqa: RUF012  # transformers wants a plain dict
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "intermediate_size": "d_inner",
    }

    vocab_size: int = 12
    d_model: int = 256
    d_inner: int | None = None
    n_layer: int = 8
    hyena_order: int = 2
    short_filter_order: int = 3
    filter_order: int = 64
    emb_dim: int = 5
    num_inner_mlps: int = 2
    activation_freq: float | int = 10
    train_freq: bool = True
    use_bias: bool = True
    max_seq_len: int = 1026
    modulation_shift: float | int = 0.05
    embed_dropout: float | int = 0.0
    hyena_dropout: float | int = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    pad_vocab_size_multiple: int = 8
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    modal: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.d_inner = 4 * self.d_model if self.d_inner is None else self.d_inner
        # the rows of the embedding; transformers shapes what a head gives by this number
        self.vocab_size = -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple
        if self.modal is not None:
            self._check_modal(self.modal)
        super().__post_init__(**kwargs)

    def _check_modal(self, modal: Any) -> None:
        """Raise ValueError unless `modal` has a number of entries for each layer, and taps that can be counted."""
        entries = modal.get("entries") if isinstance(modal, dict) else None
        if not isinstance(entries, list) or len(entries) != self.n_layer or not all(map(_counts, entries)):
            raise ValueError(f"`modal` must have `entries`, a whole number for each of {self.n_layer} layers")
        if not _counts(modal.get("fir_head", 0)):
            raise ValueError(f"`fir_head` in `modal` must be a whole number, not {modal['fir_head']!r}")

    @property
    def filters(self) -> int:
        """The different long filters of a layer."""
        return self.d_model * (self.hyena_order - 1)

    @property
    def max_position_embeddings(self) -> int | None:
        """The most tokens that the model reads; a recurrence goes on."""
        return self.max_seq_len if self.modal is None else None


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class HyenaConfig(HyenaDNAConfig):
    """Hyena as a language model (Poli et al. 2023, arXiv:2302.10866): the same model, other numbers."""

    model_type = "hyena"

    vocab_size: int = 50257
    d_model: int = 864
    n_layer: int = 18
    emb_dim: int = 33
    activation_freq: float | int = 14
    max_seq_len: int = 2048
    modulation_shift: float | int = 0.0


class MultiHyenaConfig(HyenaConfig):
    """MultiHyena (Massaroli et al. 2023, arXiv:2310.18780, section 4): `num_heads` heads, one filter for each."""

    model_type = "multihyena"

    num_heads: int = 8

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.num_heads < 1 or self.d_model % self.num_heads:
            raise ValueError(f"`num_heads` {self.num_heads} does not divide `d_model` {self.d_model}")
        if self.hyena_order != 2:
            raise ValueError(f"`hyena_order` is {self.hyena_order}, and MultiHyena has order 2")

    @property
    def filters(self) -> int:
        return self.num_heads
