"""Models in Flax linen for the zoo."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class norm(nn.Module):
    """Batch normalisation that trains where its statistics can be changed."""

    @nn.compact
    def __call__(self, x):
        fixed = self.is_initializing() or not self.is_mutable_collection("batch_stats")
        return nn.BatchNorm(use_running_average=fixed)(x)


class Vgg(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (8, "pool", 12, "pool"):
            if width == "pool":
                x = nn.max_pool(x, (2, 2), (2, 2))
            else:
                x = nn.relu(norm()(nn.Conv(width, (3, 3))(x)))
        x = nn.relu(nn.Dense(16)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


class ResNet(nn.Module):
    bottleneck: bool = False
    norm: Callable[[], nn.Module] = norm

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.norm()(nn.Conv(8, (3, 3))(x)))
        for width, first in ((8, 1), (12, 2)):
            for stride in (first, 1):
                y = x
                if self.bottleneck:
                    y = nn.relu(self.norm()(nn.Conv(width // 2, (1, 1))(y)))
                y = nn.Conv(width // (1 + self.bottleneck), (3, 3), (stride, stride))(y)
                y = nn.relu(self.norm()(y))
                y = self.norm()(nn.Conv(width, (1, 1))(y))
                if x.shape != y.shape:
                    x = self.norm()(nn.Conv(width, (1, 1), (stride, stride))(x))
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


class WideResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        for width, stride in ((8, 1), (12, 2)):
            y = nn.relu(norm()(x))
            z = nn.Conv(width, (3, 3), (stride, stride))(y)
            z = nn.Conv(width, (3, 3))(nn.relu(norm()(z)))
            if x.shape != z.shape:
                x = nn.Conv(width, (1, 1), (stride, stride))(y)
            x = x + z
        return nn.Dense(10)(nn.relu(norm()(x)).mean((1, 2)))


class Standardised(nn.Module):
    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        shape = (3, 3, x.shape[-1], self.width)
        w = self.param("kernel", nn.initializers.ones, shape)
        w = w - w.mean((0, 1, 2))
        w = w / jnp.sqrt(jnp.square(w).mean((0, 1, 2)) + 1e-10)
        strides = (self.stride, self.stride)
        how = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, strides, "SAME", dimension_numbers=how
        )


class BiT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Standardised(8)(x)
        for width, stride in ((8, 1), (12, 2)):
            y = nn.relu(nn.GroupNorm(2)(x))
            z = nn.relu(nn.GroupNorm(2)(Standardised(width, stride)(y)))
            z = Standardised(width)(z)
            x = z + (x if x.shape == z.shape else Standardised(width, stride)(y))
        return nn.Dense(10)(nn.relu(nn.GroupNorm(2)(x)).mean((1, 2)))


class ResNeXt(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        for _ in range(2):
            y = nn.relu(norm()(nn.Conv(12, (1, 1))(x)))
            y = nn.relu(norm()(nn.Conv(12, (3, 3), feature_group_count=4)(y)))
            x = nn.relu(x + norm()(nn.Conv(8, (1, 1))(y)))
        return nn.Dense(10)(x.mean((1, 2)))


class MobileNet(nn.Module):
    squeeze: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(norm()(nn.Conv(6, (3, 3))(x)))
        for _ in range(2):
            y = nn.relu6(norm()(nn.Conv(12, (1, 1))(x)))
            y = nn.relu6(norm()(nn.Conv(12, (3, 3), feature_group_count=12)(y)))
            if self.squeeze:
                z = nn.silu(nn.Conv(3, (1, 1))(y.mean((1, 2), keepdims=True)))
                y = y * nn.sigmoid(nn.Conv(12, (1, 1))(z))
            x = x + norm()(nn.Conv(6, (1, 1))(y))
        return nn.Dense(10)(x.mean((1, 2)))


class Eca(nn.Module):
    """Convolutions along the channels gate them."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        for _ in range(2):
            y = norm()(nn.Conv(8, (3, 3))(nn.relu(norm()(nn.Conv(6, (3, 3))(x)))))
            gate = nn.Conv(1, (3,), use_bias=False)(y.mean((1, 2))[..., None])
            x = nn.relu(x + y * nn.sigmoid(gate[..., 0])[:, None, None])
        return nn.Dense(10)(x.mean((1, 2)))


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3))(x)
        for _ in range(2):
            for _ in range(2):
                y = nn.Conv(8, (1, 1))(nn.relu(norm()(x)))
                y = nn.Conv(4, (3, 3))(nn.relu(norm()(y)))
                x = jnp.concatenate([x, y], -1)
            x = nn.avg_pool(nn.Conv(6, (1, 1))(nn.relu(norm()(x))), (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


class ShuffleNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        for _ in range(2):
            y = nn.relu(norm()(nn.Conv(8, (1, 1), feature_group_count=2)(x)))
            b, h, w, c = y.shape
            y = y.reshape(b, h, w, 2, c // 2).swapaxes(3, 4).reshape(b, h, w, c)
            y = norm()(nn.Conv(8, (3, 3), feature_group_count=8)(y))
            x = nn.relu(x + norm()(nn.Conv(8, (1, 1))(y)))
        return nn.Dense(10)(x.mean((1, 2)))


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        a = nn.relu(nn.Conv(6, (3, 3))(x))
        b = nn.relu(nn.Conv(8, (3, 3), (2, 2))(a))
        c = nn.relu(nn.Conv(10, (3, 3), (2, 2))(b))
        up = nn.relu(nn.ConvTranspose(8, (2, 2), (2, 2))(c))
        up = nn.relu(nn.Conv(8, (3, 3))(jnp.concatenate([up, b], -1)))
        up = jax.image.resize(up, (*a.shape[:3], 8), "nearest")
        return nn.Conv(2, (3, 3))(jnp.concatenate([up, a], -1))


class ConvNeXt(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Conv(8, (2, 2), (2, 2))(x))
        for i in range(2):
            y = nn.LayerNorm()(nn.Conv(8, (3, 3), feature_group_count=8)(x))
            y = nn.Dense(8)(nn.gelu(nn.Dense(16)(y)))
            x = x + y * self.param(f"scale{i}", nn.initializers.ones, (8,))
        return nn.Dense(10)(nn.LayerNorm()(x.mean((1, 2))))


class ViT(nn.Module):
    fused: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (2, 2), (2, 2))(x)
        x = x.reshape(x.shape[0], -1, 12)
        first = self.param("cls", nn.initializers.ones, (1, 1, 12))
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, 12)), x], 1)
        x = x + self.param("pos", nn.initializers.ones, (1, x.shape[1], 12))
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x = x + (
                self.attend(y) if self.fused else nn.MultiHeadDotProductAttention(3)(y)
            )
            y = nn.Dense(20)(nn.LayerNorm()(x))
            x = x + nn.Dense(12)(nn.gelu(y))
        return nn.Dense(10)(nn.LayerNorm()(x)[:, 0])

    def attend(self, x):
        b, n, c = x.shape
        q, k, v = jnp.moveaxis(nn.Dense(3 * c)(x).reshape(b, n, 3, 3, c // 3), 2, 0)
        a = nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k) / (c // 3) ** 0.5)
        y = jnp.einsum("bhnm,bmhd->bnhd", a, v).reshape(b, n, c)
        return nn.Dense(c)(y)


class Swin(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), (2, 2))(x)
        for shift in (0, 1):
            b, h, w, c = x.shape
            y = jnp.roll(nn.LayerNorm()(x), (-shift, -shift), (1, 2))
            y = y.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
            q, k, v = jnp.split(nn.Dense(3 * c)(y.reshape(-1, 4, c)), 3, -1)
            q, k, v = (z.reshape(-1, 4, 2, c // 2) for z in (q, k, v))
            a = jnp.einsum("bnhd,bmhd->bhnm", q, k)
            a = a + self.param(f"bias{shift}", nn.initializers.ones, (2, 4, 4))
            y = jnp.einsum("bhnm,bmhd->bnhd", nn.softmax(a), v).reshape(-1, 4, c)
            y = nn.Dense(c)(y).reshape(b, h // 2, w // 2, 2, 2, c)
            y = y.transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
            x = x + jnp.roll(y, (shift, shift), (1, 2))
            x = x + nn.Dense(c)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x))))
        return nn.Dense(10)(x.mean((1, 2)))


class Mixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(12)(x)
        y = nn.LayerNorm()(x).swapaxes(1, 2)
        x = x + nn.Dense(6)(nn.gelu(nn.Dense(7)(y))).swapaxes(1, 2)
        x = x + nn.Dense(12)(nn.gelu(nn.Dense(20)(nn.LayerNorm()(x))))
        return nn.Dense(3)(x.mean(1))


class EncoderDecoder(nn.Module):
    @nn.compact
    def __call__(self, words, targets):
        embed = nn.Embed(11, 12)
        x, y = embed(words), embed(targets)
        x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(2)(x))
        x = nn.LayerNorm()(x + nn.Dense(12)(nn.relu(nn.Dense(16)(x))))
        mask = nn.make_causal_mask(targets)
        y = nn.LayerNorm()(y + nn.MultiHeadDotProductAttention(2)(y, mask=mask))
        y = nn.LayerNorm()(y + nn.MultiHeadDotProductAttention(3)(y, x))
        y = nn.LayerNorm()(y + nn.Dense(12)(nn.relu(nn.Dense(16)(y))))
        return nn.Dense(11)(y)


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, words):
        embed = nn.Embed(11, 16)
        x = embed(words)
        n = x.shape[1]
        angle = jnp.arange(n)[:, None] * 10.0 ** (-jnp.arange(2) / 2)
        cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]

        def rotate(z):
            a, b = jnp.split(z, 2, -1)
            return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

        for _ in range(2):
            y = nn.RMSNorm()(x)
            q = rotate(nn.DenseGeneral((4, 4), use_bias=False)(y))
            k = rotate(nn.DenseGeneral((2, 4), use_bias=False)(y))
            v = nn.DenseGeneral((2, 4), use_bias=False)(y)
            k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
            a = jnp.einsum("bnhd,bmhd->bhnm", q, k) / 2
            a = jnp.where(jnp.tril(jnp.ones((n, n), bool)), a, -1e9)
            y = jnp.einsum("bhnm,bmhd->bnhd", nn.softmax(a), v)
            x = x + nn.DenseGeneral(16, axis=(-2, -1), use_bias=False)(y)
            y = nn.RMSNorm()(x)
            x = x + nn.Dense(16)(nn.silu(nn.Dense(24)(y)) * nn.Dense(24)(y))
        return embed.attend(nn.RMSNorm()(x))


class Recurrent(nn.Module):
    cell: Any

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.RNN(self.cell(8, param_dtype=jnp.float64))(x)
        return nn.Dense(3)(x[:, -1])


class StateSpace(nn.Module):
    """S5: complex diagonal states, held exactly between steps of learned lengths."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        for i in range(2):
            x = x + self.mix(nn.LayerNorm()(x), str(i), 6)
        return nn.Dense(3)(x.mean(1))

    def mix(self, x, layer, states):
        def real(name, *shape):
            return self.param(name + layer, nn.initializers.ones, shape)

        def number(name, *shape):
            return jax.lax.complex(real(name, *shape), real(name + "i", *shape))

        def follow(a, b):
            return b[0] * a[0], b[0] * a[1] + b[1]

        def run(u):
            start = jnp.broadcast_to(decay, u.shape)
            return jax.lax.associative_scan(follow, (start, u))[1]

        width = x.shape[-1]
        rate = jax.lax.complex(-jnp.exp(real("rate", states)), real("pitch", states))
        decay = jnp.exp(rate * jnp.exp(real("step", states)))
        b = ((decay - 1) / rate)[:, None] * number("b", states, width)
        h = jax.vmap(run)(x @ b.T)
        y = 2 * (h @ number("c", width, states).T).real + x * real("d", width)
        y = nn.gelu(y)
        return y * nn.sigmoid(nn.Dense(width)(y))


class Vae(nn.Module):
    @nn.compact
    def __call__(self, x, key):
        h = nn.relu(nn.Dense(12)(x))
        mean, log_variance = nn.Dense(4)(h), nn.Dense(4)(h)
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        z = mean + jnp.exp(log_variance / 2) * noise
        kl = jnp.mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance, axis=-1)
        return nn.Dense(5)(nn.relu(nn.Dense(12)(z))), kl


class ActorCritic(nn.Module):
    @nn.compact
    def __call__(self, x, goal):
        trunk = nn.tanh(nn.Dense(12)(x) + nn.Dense(12)(goal))
        trunk = nn.tanh(nn.Dense(12)(trunk))
        policy = nn.log_softmax(nn.Dense(4)(nn.relu(nn.Dense(8)(trunk))))
        return {"policy": policy, "value": nn.Dense(1)(trunk)[..., 0]}


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        gate = nn.softmax(nn.Dense(4)(x))
        init = nn.initializers.ones
        up, down = (
            self.param("up", init, (4, 8, 12)),
            self.param("down", init, (4, 12, 8)),
        )
        y = nn.relu(jnp.einsum("bnd,edh->bneh", x, up))
        y = jnp.einsum("bne,bneh,eho->bno", gate, y, down)
        return nn.Dense(3)(x + y)


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        for _ in range(2):
            x = x + nn.Dense(8)(nn.tanh(nn.remat(nn.Dense)(12)(x)))
        return nn.Dense(3)(x)
