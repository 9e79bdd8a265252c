"""Prompts in a two-tower network: how far they displace the embeddings, and what that does to their alignment.

Public: `TwoTowers`, `PromptedTower`, `SurgeryBlock`, `feature_shift`, `shift_consistency_loss`, `alignment`.
"""

import copy

import torch
from torch import Tensor, nn

from companion.checks import check_positive_int

__all__ = ["PromptedTower", "SurgeryBlock", "TwoTowers", "alignment", "feature_shift", "shift_consistency_loss"]


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
