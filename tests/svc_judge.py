"""A judge of digits that is not ours: scikit-learn's SVC, trained on the real training digits.

python tests/svc_judge.py samples.npz [MORE.npz ...]
"""

import sys

import numpy as np
from sklearn.svm import SVC

from cfjax.data.image_files import read_images
from cfjax.data.sources import MnistSource, all_images


def train():
    """The SVC after training on all 4,000 training digits."""
    images, labels = all_images(MnistSource("train"))
    return SVC(C=10).fit(_vectors(images), labels)


def agreement(judge, images, labels):
    """Share of uint8 images `[N, 28, 28, 1]` that the judge gives their label."""
    return judge.score(_vectors(images), labels)


def _vectors(images):
    return images.reshape(len(images), -1) / np.float64(255)


if __name__ == "__main__":
    judge = train()
    for path in sys.argv[1:]:
        images, labels = read_images(path)
        sys.stdout.write(f"{path}: {agreement(judge, images, labels):.1%} of {len(images)}\n")
