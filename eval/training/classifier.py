"""Train the bundled garment classifier on the real Fashion-MNIST training images.

    python -m dita.eval.training.classifier --epochs 8 --seed 0 --threads 1 --out eval/models/fashion-classifier

AdamW, batch 128, a one-cycle learning rate; each image is shifted by up to two pixels, so nothing but the black margin
is lost. The test images choose nothing: the weights of the last step are kept, and tested once as they were saved.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from dita.eval.classifier import FashionClassifier, in_batches, load_classifier
from dita.eval.data import CLASSES, load_fashion_mnist
from dita.eval.reference import measure_reference


def shifted(images: torch.Tensor, generator: torch.Generator, reach: int = 2) -> torch.Tensor:
    """Shift each image by its own whole number of pixels, up to `reach` along both axes, filling with black (-1).

    Args:
        images: float [N, 1, H, W].
        generator: source of the shifts.
        reach: largest shift.

    Returns:
        float [N, 1, H, W].

    Example:
        >>> shifted(torch.zeros(4, 1, 8, 8), torch.Generator().manual_seed(0)).shape
        torch.Size([4, 1, 8, 8])
    """
    count, _, height, width = images.shape
    padded = F.pad(images, (reach,) * 4, value=-1.0)
    top, left = torch.randint(0, 2 * reach + 1, (2, count), generator=generator)
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    return padded[torch.arange(count)[:, None, None, None], 0, rows, columns]


def train(args: argparse.Namespace) -> FashionClassifier:
    """Train for `args.epochs` passes and return the network in evaluation mode."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(args.seed)
    images, labels = load_fashion_mnist("train", args.data)
    net = FashionClassifier().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    forward = torch.compile(net) if args.compile else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=0.02)
    steps = args.epochs * (len(images) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.2)
    for epoch in range(args.epochs):
        total, right, seen = 0.0, 0, 0
        for picked in torch.randperm(len(images), generator=generator).split(args.batch):
            if len(picked) < args.batch:
                continue
            batch = shifted(images[picked], generator).contiguous(memory_format=torch.channels_last)
            logits = forward(batch)
            loss = F.cross_entropy(logits, labels[picked])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total, seen = total + loss.item() * len(picked), seen + len(picked)
            right += int((logits.argmax(1) == labels[picked]).sum())
        print(
            f"epoch {epoch + 1}/{args.epochs}: loss {total / seen:.4f}, train accuracy {right / seen:.4f}", flush=True
        )
    return net.eval()


def test(folder: Path, data: str | None) -> dict[str, object]:
    """Measure the saved float16 weights on the 10,000 test images: accuracy and accuracy per class in [0, 1]."""
    images, labels = load_fashion_mnist("test", data)
    right = in_batches(load_classifier(folder), images).argmax(1) == labels
    per_class = {name: round(right[labels == i].float().mean().item(), 4) for i, name in enumerate(CLASSES)}
    return {"test_accuracy": round(right.float().mean().item(), 4), "per_class": per_class}


def main() -> None:
    """Parse the command line, train, save, test, and keep the real images' features."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/fashion-classifier", help="folder of the weights")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", default=None, help="folder of the idx files")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    start, cpu = time.monotonic(), time.process_time()
    net = train(args)
    spent = {"minutes": (time.monotonic() - start) / 60, "cpu_minutes": (time.process_time() - cpu) / 60}
    net.save(args.out)
    record = {**vars(args), **{k: round(v, 1) for k, v in spent.items()}, "torch": torch.__version__}
    record |= test(Path(args.out), args.data)
    measure_reference(load_classifier(args.out), args.data).save(args.out)
    (Path(args.out) / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
