"""The image tokens that a module or block is about to read, and the same call on fewer of them.

The one place that knows by which arguments positions, masks and numbers per token travel along. What it does not
understand it refuses: attention on tokens with the positions of others would be nonsense that looks like an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dita.attention_view import Attended, AttentionTaken
from dita.errors import DitaError
from dita.seams import Reducer

_POSITIONS = ("image_rotary_emb", "rotary_emb", "freqs_cis")
_NOT_UNDERSTOOD = ("modulate_index", "num_tokens", "token_replace_emb")
_ELSEWHERE = ("encoder_", "ip_")  # starts of names of what belongs to no image token


@dataclass(frozen=True)
class TokenInput:
    """One call of a module or block that reads the image tokens.

    Attributes:
        where: name of the module, for messages.
        args, kwargs: of the call.
        names: of its parameters, in order.
        hidden: which of them holds the image tokens, [B, V, C], or [B, V + T, C] together with the text.
        image, text: V and T: how many tokens there are of each; T is 0 where no text takes part.
        text_first: in one sequence, text comes before the image.
        joined: `hidden` holds the text too.
        place: in a tuple that it returns, which tensor is the image's.
    """

    where: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...]
    hidden: str
    image: int
    text: int
    text_first: bool
    joined: bool
    place: int = 0

    @classmethod
    def read(
        cls,
        where: str,
        names: tuple[str, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        grid: tuple[int, ...],
        text_at: str,
        place: int = 0,
        encoder: str = "encoder_hidden_states",
    ) -> TokenInput | str:
        """Find the image tokens among the arguments of a call.

        Args:
            where, names, args, kwargs, place: as the attributes.
            grid: frames, rows and columns of image tokens.
            text_at: "first" or "last", where text stands in one sequence with the image; "" for nowhere.
            encoder: name of the argument that holds the text, where it comes apart; ignored if `text_at` is "".

        Returns:
            the call, or in words why its tokens are not known.

        Example:
            >>> x = torch.zeros(1, 7, 2)
            >>> found = TokenInput.read("attn", ("hidden_states",), (x,), {}, (1, 2, 2), "first")
            >>> found.text, found.joined, found.tokens.shape
            (3, True, torch.Size([1, 4, 2]))
        """
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden = "hidden_states" if "hidden_states" in given else next(iter(given), "")
        tokens = given.get(hidden)
        if not isinstance(tokens, torch.Tensor) or tokens.ndim != 3:
            return f"{where} reads no tensor of tokens"
        if len(grid) != 3:
            return "the model does not tell how its image tokens lie in frames, rows and columns"
        image = grid[0] * grid[1] * grid[2]
        apart = given.get(encoder) if text_at else None
        text = apart.shape[1] if isinstance(apart, torch.Tensor) else tokens.shape[1] - image
        joined = not isinstance(apart, torch.Tensor) and text > 0
        if text < 0 or (joined and not text_at) or tokens.shape[1] != image + (text if joined else 0):
            return f"{tokens.shape[1]} tokens are not the {' x '.join(map(str, grid))} of the image"
        return cls(where, args, kwargs, names, hidden, image, text, text_at == "first", joined, place)

    @property
    def tokens(self) -> torch.Tensor:
        """The image tokens [B, V, C]."""
        return self._image_of(dict(self._named())[self.hidden])

    def run(self, call: Callable[..., Any], reducer: Reducer) -> Any:
        """Make the call on reduced tokens and restore its output.

        Raises:
            DitaError: positions, masks or other arguments are not understood, or the output is not.
        """
        if reducer.positions is None:
            return self._restored(call(*self.args, **self.kwargs), reducer)
        tokens, positions = self.tokens, reducer.positions
        batch = len(tokens)
        whole = _Converted(self, reducer.reduce(tokens), positions.expand(batch, -1), len(positions) == 1)
        if len(positions) == 1 or not whole.must_be_alone:
            parts = [(whole, reducer.sizes)]
        else:
            # Positions that a model shares among samples cannot differ in one call.
            parts = [(whole.sample(b), None if reducer.sizes is None else reducer.sizes[b : b + 1])
                     for b in range(batch)]  # fmt: skip
        outputs = []
        for part, sizes in parts:
            args, kwargs = part.arguments()
            if sizes is None:
                outputs.append(call(*args, **kwargs))
            else:
                with AttentionTaken(_weighed(sizes, self.text, self.text_first)):
                    outputs.append(call(*args, **kwargs))
        return self._restored(_joined(outputs), reducer)

    def _named(self) -> Iterator[tuple[str, Any]]:
        """Arguments by name; "" for those beyond the named ones."""
        names = (*self.names, *("",) * len(self.args))
        yield from zip(names, self.args, strict=False)
        yield from self.kwargs.items()

    def _image_of(self, x: torch.Tensor) -> torch.Tensor:
        if not self.joined:
            return x
        return x[:, self.text :] if self.text_first else x[:, : x.shape[1] - self.text]

    def _with_text(self, image: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """`image` in one sequence with the text of `whole`, where it was so."""
        if not self.joined:
            return image
        text = whole[:, : self.text] if self.text_first else whole[:, whole.shape[1] - self.text :]
        return torch.cat([text, image] if self.text_first else [image, text], 1)

    def _restored(self, output: Any, reducer: Reducer) -> Any:
        many = isinstance(output, tuple)
        if (many and len(output) > 2) or not isinstance(output[self.place] if many else output, torch.Tensor):
            raise DitaError(
                f"{self.where} returned {len(output) if many else type(output).__name__} values; expected the image "
                "tokens, or them and the text: its tokens cannot be reduced. dita.restore_pipeline(pipe) takes this off"
            )
        found = output[self.place] if many else output
        restored = self._with_text(reducer.restore(self._image_of(found)), found)
        return tuple(restored if n == self.place else t for n, t in enumerate(output)) if many else restored


class _Converted:
    """The arguments of a call on other image tokens.

    Args:
        source: the call.
        tokens: [B, M, C].
        positions: [B, M], whose position each takes.
        shared: all samples take the same.
    """

    def __init__(self, source: TokenInput, tokens: torch.Tensor, positions: torch.Tensor, shared: bool) -> None:
        self.source, self.tokens, self.positions, self.shared = source, tokens, positions, shared
        self.row: int | None = None

    def sample(self, row: int) -> _Converted:
        """The same for one sample alone."""
        one = _Converted(self.source, self.tokens[row : row + 1], self.positions[row : row + 1], True)
        one.row = row
        return one

    @property
    def must_be_alone(self) -> bool:
        """Some table of positions has no place for samples that differ."""
        tables = [v for n, v in self.source._named() if n in _POSITIONS and v is not None]
        return any(t.ndim == 2 for value in tables for t in _tensors(value))

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional arguments and those by name."""
        named = list(self.source._named())
        converted = [self._convert(name, value) for name, value in named]
        count = len(self.source.args)
        return tuple(converted[:count]), dict(zip(self.source.kwargs, converted[count:], strict=True))

    def _convert(self, name: str, value: Any) -> Any:
        source = self.source
        if name == source.hidden:
            return source._with_text(self.tokens, self._sliced(value))
        if value is None or isinstance(value, (bool, int, float, str)):
            if value is not None and name in _NOT_UNDERSTOOD:
                raise self._refusal(name, value)
            return value
        if name in _NOT_UNDERSTOOD:
            raise self._refusal(name, value)
        if name in _POSITIONS:
            return self._gathered(name, value)
        if isinstance(value, dict):
            return {key: self._convert(key, entry) for key, entry in value.items()}
        if not isinstance(value, torch.Tensor):
            if isinstance(value, (list, tuple)) and len(value) in (source.image, source.image + source.text):
                raise self._refusal(name, value)
            return value
        return self._tensor(name, value)

    def _tensor(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A mask is cropped, what belongs to tokens travels with them, all else stays."""
        source, whole = self.source, self.source.image + self.source.text
        if name.startswith(_ELSEWHERE):
            return self._sliced(value)
        if "mask" in name:
            width = value.shape[-1]
            if width == whole and all(size == 1 for size in value.shape[1:-1]):
                rows = value.expand(len(source.tokens), *value.shape[1:])
                return self._sliced(_take(rows.movedim(-1, 1), self._rows_of_all()).movedim(1, -1))
            if width == source.text and source.text:
                return self._sliced(value)
            raise self._refusal(name, value)
        if value.ndim >= 3 and value.shape[1] == source.image:
            return self._sliced(_take(value.expand(len(source.tokens), *value.shape[1:]), self._all_positions()))
        places = value.ndim == 2 and not value.is_floating_point() and not value.is_complex()
        if (value.ndim >= 3 or places) and value.shape[1] in (source.image, whole) and whole > 1:
            raise self._refusal(name, value)
        return self._sliced(value)

    def _gathered(self, name: str, value: Any) -> Any:
        tensors = _tensors(value)
        if len(tensors) == 2 and all(t.is_complex() and t.ndim == 2 for t in tensors):
            image, text = tensors  # Qwen-Image turns the two streams by tables of their own
            if len(image) != self.source.image:
                raise self._refusal(name, value)
            return type(value)((self._rotary(name, image), text))
        if not tensors or any(t.shape != tensors[0].shape for t in tensors):
            raise self._refusal(name, value)
        turned = [self._rotary(name, t) for t in tensors]
        return turned[0] if isinstance(value, torch.Tensor) else type(value)(turned)

    def _rotary(self, name: str, table: torch.Tensor) -> torch.Tensor:
        """Rows of a table [S, D], [S, H, D], [B, S, C] or [1, S, 1, D]; S counts image tokens, or all."""
        source, batch = self.source, len(self.source.tokens)
        counts = {source.image, source.image + source.text}
        if table.ndim == 2 and len(table) in counts:
            return table[self._rows(len(table))[0]]
        by_sample = table.ndim in (3, 4) and table.shape[0] in (1, batch) and table.shape[1] in counts
        by_head = table.ndim == 3 and table.shape[0] in counts
        if by_sample == by_head:
            raise self._refusal(name, table)
        if by_head:
            rows = self._rows(len(table))
            return table[rows[0]] if self.shared else table[rows]
        if len(table) == batch > 1:
            table = self._sliced(table)
        return _take(table.expand(len(self.positions), *table.shape[1:]), self._rows(table.shape[1]))

    def _rows(self, count: int) -> torch.Tensor:
        """Rows of a table over `count` tokens that the reduced sequence takes: int64 [B or 1, M or M + T]."""
        if count == self.source.image:
            return self.positions
        return self._among_all(self.positions)

    def _among_all(self, positions: torch.Tensor) -> torch.Tensor:
        text, image = self.source.text, self.source.image
        first = text if self.source.text_first else 0
        place = torch.arange(text, device=positions.device) + (0 if self.source.text_first else image)
        rows, others = positions + first, place.expand(len(positions), -1)
        return torch.cat([others, rows] if self.source.text_first else [rows, others], 1)

    def _all_positions(self) -> torch.Tensor:
        """Positions for every sample of the call, of which `_sliced` then takes ours."""
        return self.positions.expand(len(self.source.tokens), -1) if self.row is not None else self.positions

    def _rows_of_all(self) -> torch.Tensor:
        return self._among_all(self._all_positions())

    def _sliced(self, value: torch.Tensor) -> torch.Tensor:
        """The row of the sample, where there is one and the tensor has one per sample."""
        if self.row is None or value.ndim == 0 or len(value) != len(self.source.tokens):
            return value
        return value[self.row : self.row + 1]

    def _refusal(self, name: str, value: Any) -> DitaError:
        shapes = [tuple(t.shape) for t in _tensors(value)]
        what = " and ".join(map(str, shapes)) if shapes else type(value).__name__
        return DitaError(
            f"{self.source.where} is called with {name} ({what}), of which dita does not know how it belongs to the "
            f"{self.source.image} image and {self.source.text} text tokens, so that these cannot be reduced here; "
            "asymrnr reduces them behind that, inside the attention"
        )


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for t in value if isinstance(t, torch.Tensor)] if isinstance(value, (list, tuple)) else []


def _take(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x[b, rows[b]]."""
    return x[torch.arange(len(rows), device=rows.device)[:, None], rows]


def _joined(outputs: list[Any]) -> Any:
    """Outputs of single samples as those of a batch."""
    if len(outputs) == 1:
        return outputs[0]
    if isinstance(outputs[0], tuple):
        columns = zip(*outputs, strict=True)
        return tuple(None if c[0] is None else torch.cat(c) for c in columns)
    return torch.cat(outputs)


def _weighed(
    sizes: torch.Tensor, text: int, text_first: bool
) -> Callable[[Attended, Callable[[Attended], torch.Tensor]], torch.Tensor]:
    """Let every reduced key count for the tokens it stands for: log(size) is added to its logits.

    Args:
        sizes: [B, M].
        text: most text tokens in a call; models that leave padding out have fewer.
        text_first: they come before the image.
    """
    calls = 0

    def take(seen: Attended, plain: Callable[[Attended], torch.Tensor]) -> torch.Tensor:
        nonlocal calls
        others = seen.k.shape[2] - sizes.shape[1]
        if not 0 <= others <= text:
            return plain(seen)
        rows = sizes
        if len(seen.q) == 1 and len(sizes) > 1:  # a model that attends sample by sample
            rows = sizes[calls : calls + 1]
            calls += 1
        bias = torch.nn.functional.pad(rows.log(), (others, 0) if text_first else (0, others))[:, None, None]
        return seen.biased(bias.to(seen.q.dtype)).attend()

    return take
