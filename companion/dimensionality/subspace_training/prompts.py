"""Prompts in a two-tower network: how far they displace the embeddings, and what that does to their alignment.

Public: `TwoTowers`, `PromptedTower`, `PromptedTowers`, `Prompted`, `SurgeryBlock`, `feature_shift`,
`shift_consistency_loss`, `alignment`.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from companion.checks import check_positive_int

__all__ = [
    "Prompted",
    "PromptedTower",
    "PromptedTowers",
    "SurgeryBlock",
    "TwoTowers",
    "alignment",
    "feature_shift",
    "shift_consistency_loss",
]


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.ndim < 2 or a.shape != b.shape:
        raise ValueError(f"expected two sets of embeddings of one shape (n, d), got {tuple(a.shape)}, {tuple(b.shape)}")


def feature_shift(new: Tensor, old: Tensor) -> Tensor:
    """Return how far each embedding was displaced: the length of new - old, (n,).

    >>> feature_shift(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
    tensor([5.])

    Paper: yang2024restore
    Chapter: dimensionality/subspace-training
    """
    _same_shape(new, old)
    return (new - old).norm(dim=-1)


def shift_consistency_loss(image_shift: Tensor, text_shift: Tensor) -> Tensor:
    r"""Penalise displacing one tower more than the other: $(\overline{\|d_I\|} - \overline{\|d_T\|})^2$.

    Args:
        image_shift: lengths from `feature_shift`, (n,).
        text_shift: lengths from `feature_shift`, (m,).

    >>> shift_consistency_loss(torch.tensor([1.0, 3.0]), torch.tensor([1.0]))
    tensor(1.)

    Paper: yang2024restore
    Chapter: dimensionality/subspace-training
    """
    return (image_shift.mean() - text_shift.mean()).square()


def alignment(images: Tensor, texts: Tensor) -> Tensor:
    """Return the mean cosine between each image embedding and the embedding of its own text.

    Args:
        images: (n, d).
        texts: (n, d), row i belongs to image i.

    >>> alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    tensor(1.)

    Paper: yang2024restore
    Chapter: dimensionality/subspace-training
    """
    _same_shape(images, texts)
    return nn.functional.cosine_similarity(images, texts, dim=-1).mean()


class TwoTowers(nn.Module):
    r"""Two networks that embed images and texts into one space, compared by cosine.

    Logits are $s \langle f(x) / \|f(x)\|, g(t) / \|g(t)\| \rangle$, one per text: classification without a head, so
    that classes nobody tuned for can be asked about.

    Args:
        image: network for images, (n, ...) to (n, d).
        text: network for texts, (c, ...) to (c, d).
        scale: s, the inverse temperature.

    >>> towers = TwoTowers(nn.Linear(4, 2), nn.Linear(3, 2))
    >>> towers(torch.randn(5, 4), torch.randn(6, 3)).shape
    torch.Size([5, 6])

    Paper: yang2024restore
    Chapter: dimensionality/subspace-training
    """

    def __init__(self, image: nn.Module, text: nn.Module, scale: float = 10.0):
        super().__init__()
        self.image, self.text, self.scale = image, text, float(scale)

    def embed_images(self, images: Tensor) -> Tensor:
        """Return unit embeddings of images, (n, d)."""
        return nn.functional.normalize(self.image(images), dim=-1)

    def embed_texts(self, texts: Tensor) -> Tensor:
        """Return unit embeddings of texts, (c, d)."""
        return nn.functional.normalize(self.text(texts), dim=-1)

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return the logits of every image for every text, (n, c)."""
        return self.scale * self.embed_images(images) @ self.embed_texts(texts).mT


class PromptedTower(nn.Module):
    r"""A frozen tower with a learned vector added behind one of its layers.

    The prompt, zero at first, is added to the output of the named layer for every input: the smallest stand-in for
    learned tokens, which a transformer attends to. The tower's own parameters are frozen copies.

    Args:
        tower: any module; it is copied.
        layer: name of the submodule whose output the prompt is added to, as in `named_modules()`.
        dim: length of that output's last axis.

    Raises:
        ValueError: there is no such layer.

    >>> prompted = PromptedTower(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), layer="0", dim=8)
    >>> [name for name, p in prompted.named_parameters() if p.requires_grad]
    ['prompt']

    Paper: yang2024restore
    Chapter: dimensionality/subspace-training
    """

    def __init__(self, tower: nn.Module, layer: str, dim: int):
        super().__init__()
        if layer not in dict(tower.named_modules()):
            raise ValueError(
                f"expected the name of a layer, got {layer!r}; there are {[n for n, _ in tower.named_modules()]}"
            )
        self.tower = copy.deepcopy(tower).requires_grad_(False)
        self.layer = layer
        like = next(self.tower.parameters())
        self.prompt = nn.Parameter(like.new_zeros(check_positive_int(dim, "dim")))

    def forward(self, x: Tensor) -> Tensor:
        """Run the tower with the prompt in place."""
        hook = self.tower.get_submodule(self.layer).register_forward_hook(lambda _, __, output: output + self.prompt)
        try:
            return self.tower(x)
        finally:
            hook.remove()


class Prompted(NamedTuple):
    """What `PromptedTowers` returns for n images and c texts.

    Paper: yang2024restore
    Chapter: dimensionality/subspace-training
    """

    logits: Tensor  # (n, c)
    image_shift: Tensor  # (n,)
    text_shift: Tensor  # (c,)
    images: Tensor  # (n, d), of length one
    texts: Tensor  # (c, d), of length one


class PromptedTowers(nn.Module):
    r"""Two frozen towers with a learned prompt in one or both, and a fixed list of texts to choose from.

    Beside the logits it returns the new embeddings and how far they are from the old ones, which is what penalties
    and diagnoses need.

    Args:
        towers: the trained pair; it is copied.
        texts: the texts of all classes, (c, ...).
        layer: name of the layer of both networks whose output the prompts are added to.
        dim: length of that output's last axis.
        image: whether the prompt of the image tower is trained.
        text: whether the prompt of the text tower is trained.

    Raises:
        ValueError: neither prompt is trained, or there is no such layer.

    >>> image, text = (nn.Sequential(nn.Linear(n, 8), nn.Linear(8, 2)) for n in (4, 3))
    >>> out = PromptedTowers(TwoTowers(image, text), torch.eye(3), layer="0", dim=8)(torch.randn(5, 4))
    >>> out.logits.shape, out.image_shift.max().item()
    (torch.Size([5, 3]), 0.0)

    Paper: yang2024restore
    Chapter: dimensionality/subspace-training
    """

    def __init__(
        self, towers: TwoTowers, texts: Tensor, layer: str, dim: int, *, image: bool = True, text: bool = True
    ):
        super().__init__()
        if not (image or text):
            raise ValueError("expected image=True or text=True: with neither there is nothing to train")
        self.before = copy.deepcopy(towers).requires_grad_(False)
        self.after = TwoTowers(
            PromptedTower(towers.image, layer, dim), PromptedTower(towers.text, layer, dim), towers.scale
        )
        self.after.image.prompt.requires_grad_(image)
        self.after.text.prompt.requires_grad_(text)
        self.register_buffer("choices", texts.detach().clone())

    def forward(self, images: Tensor) -> Prompted:
        """Return logits, shifts and embeddings for a batch of images, (n, ...)."""
        i, t = self.after.embed_images(images), self.after.embed_texts(self.choices)
        image_shift = feature_shift(i, self.before.embed_images(images))
        text_shift = feature_shift(t, self.before.embed_texts(self.choices))
        return Prompted(self.after.scale * i @ t.mT, image_shift, text_shift, i, t)


class SurgeryBlock(nn.Module):
    r"""A residual feed-forward adapter behind a tower: $x + W_2\,\mathrm{relu}(W_1 x)$, with $W_2 = 0$ at first.

    It can turn embeddings back where a prompt has displaced both towers by the same amount in unrelated directions,
    which a penalty on the sizes of the shifts does not see.

    Args:
        dim: d, width of the embeddings.
        hidden: width of the adapter.
        random_state: seed of $W_1$.

    >>> SurgeryBlock(4, 8)(torch.ones(1, 4))
    tensor([[1., 1., 1., 1.]], grad_fn=...)

    Paper: yang2024restore
    Chapter: dimensionality/subspace-training
    """

    def __init__(self, dim: int, hidden: int, *, random_state: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(random_state)
        down = torch.randn(check_positive_int(hidden, "hidden"), check_positive_int(dim, "dim"), generator=generator)
        self.down = nn.Parameter(down * (2 / dim) ** 0.5)
        self.up = nn.Parameter(torch.zeros(dim, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., d)."""
        return x + torch.relu(x @ self.down.T) @ self.up.T
