"""Vision transformers, in Flax NNX."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Vit:
    """A vision transformer with learned positions, averaged over the patches.

    The network itself is an NNX module. This class has the ``init`` and ``apply`` of a
    Linen module, with the parameters as a nested dict.

    Attributes:
      widths: features, then neurons of the dense layers inside the blocks.
      depth: blocks.
      heads: attention heads of a block.
      patch: side of the patches.
      classes: outputs.
      dtype: what the layers compute in; the parameters are float32.
    """

    widths: tuple[int, ...] = (384, 1536)
    depth: int = 12
    heads: int = 6
    patch: int = 4
    classes: int = 10
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        """Checks the widths."""
        if self.widths[0] % self.heads:
            raise ValueError(
                f"the first width of a vision transformer must be a multiple of its "
                f"{self.heads} heads; got {self.widths[0]}"
            )

    def init(self, key: jax.Array, images: jax.Array) -> dict[str, Any]:
        """Random variables for images of this shape.

        Args:
          key: a random key.
          images: images ``(batch, height, width, channels)``.

        Returns:
          ``{"params": …}``.

        Raises:
          ValueError: if the images cannot be divided into patches.
        """
        module = Transformer(self, images.shape[1:], nnx.Rngs(key))
        return {"params": nnx.to_pure_dict(nnx.state(module, nnx.Param))}

    def apply(
        self,
        variables: Any,
        images: jax.Array,
        train: bool = False,
        mutable: Any = False,
    ) -> Any:
        """Logits of images.

        Args:
          variables: variables as :meth:`init` gives them.
          images: images of the shape that they were made for.
          train: nothing depends on it.
          mutable: as in Linen; there is nothing that could change.

        Returns:
          Logits; unless ``mutable`` is false, a pair of them and ``{}``.

        Raises:
          ValueError: if the images cannot be divided into patches, or into another
            number of patches than there are positions.
        """
        graph = _graph(self, images.shape[1:])
        logits = nnx.merge(graph, nnx.State(variables["params"]))(images)
        return logits if mutable is False else (logits, {})


@functools.cache
def _graph(model: Vit, shape: tuple[int, ...]) -> nnx.GraphDef:
    """The network without its parameters."""
    return nnx.split(
        nnx.eval_shape(lambda: Transformer(model, shape, nnx.Rngs(0))), nnx.Param
    )[0]


class Transformer(nnx.Module):
    """The network of a :class:`Vit`."""

    def __init__(self, model: Vit, shape: tuple[int, ...], rngs: nnx.Rngs):
        """Makes the layers.

        Args:
          model: the hyper-parameters.
          shape: height, width and channels of the images.
          rngs: for the parameters.

        Raises:
          ValueError: if the images cannot be divided into patches.
        """
        height, width, channels = shape
        if height % model.patch or width % model.patch:
            raise ValueError(
                f"a vision transformer with patches of {model.patch}×{model.patch} "
                f"pixels needs images whose sides are multiples of {model.patch}; got "
                f"{height}×{width}"
            )
        features, side, dtype = model.widths[0], (model.patch, model.patch), model.dtype
        patches = (height // model.patch) * (width // model.patch)
        self.patches = nnx.Conv(
            channels, features, side, strides=side, dtype=dtype, rngs=rngs
        )
        normal = nnx.initializers.normal(0.02)
        self.positions = nnx.Param(normal(rngs.params(), (patches, features)))
        self.depth = model.depth
        for i in range(model.depth):
            setattr(self, f"block{i}", Block(model, rngs))
        self.norm = nnx.LayerNorm(features, dtype=dtype, rngs=rngs)
        # In float32 at least, so that logits are not coarse.
        full = jnp.promote_types(dtype, jnp.float32)
        self.head = nnx.Linear(features, model.classes, dtype=full, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images ``(batch, height, width, channels)`` to logits."""
        x = self.patches(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        positions = self.positions[...]
        if positions.shape[0] != x.shape[1]:
            raise ValueError(
                f"the parameters have {positions.shape[0]} positions, and the images "
                f"{x.shape[1]} patches; give images of the size that init was given"
            )
        x = x + positions.astype(x.dtype)
        for i in range(self.depth):
            x = getattr(self, f"block{i}")(x)
        return self.head(self.norm(x).mean(1))


class Block(nnx.Module):
    """Attention and two dense layers, each behind layer norm and beside a shortcut."""

    def __init__(self, model: Vit, rngs: nnx.Rngs):
        """Makes the layers.

        Args:
          model: the hyper-parameters.
          rngs: for the parameters.
        """
        (features, hidden), dtype = model.widths, model.dtype
        self.norm0 = nnx.LayerNorm(features, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            model.heads, features, dtype=dtype, decode=False, rngs=rngs
        )
        self.norm1 = nnx.LayerNorm(features, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(features, hidden, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(hidden, features, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Patches to patches."""
        x = x + self.attention(self.norm0(x), deterministic=True)
        return x + self.down(nnx.gelu(self.up(self.norm1(x))))
