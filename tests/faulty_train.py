"""`python -m cfjax.train` with something built in: `faulty_train.py WHAT ARGUMENT --flags...`.

| WHAT | ARGUMENT | |
|---|---|---|
| `record` | folder | which example of the source each process reads, in `<folder>/<process>.<pid>` |
| `record_epoch` | folder | `record` (of documents, of rows) with an epoch of 112, and digests of saved and |
| | | restored states in `<folder>/<train step>.{saved,restored}` |
| `nan` | index | the image of that example is NaN |
| `unreadable` | process | from its 12th batch on, this process can't read images |
| `decode_late` | - | images are decoded when they are asked for, however few there are |
| `cloud` | folder | `gs://` is that folder |
| `full_disk` | train step | from its save on no file can grow beyond 64 bytes |
"""

import hashlib
import itertools
import os
import resource
import runpy
import sys

import numpy as np


class Wrapped:
    """A source whose reading is watched or spoiled."""

    max_examples = sys.maxsize

    def __init__(self, source, images_at):
        self._source, self._images_at = source, images_at

    def __getattr__(self, name):
        return getattr(self._source, name)

    def __len__(self):
        return min(len(self._source), self.max_examples)

    def examples_at(self, indices):
        examples = self._source.examples_at(indices)
        return examples | {"image": self._images_at(indices, examples["image"])}


def wrap_source(images_at):
    from cfjax import build_data

    open_source = build_data.open_source
    build_data.open_source = lambda *args, **kwargs: Wrapped(
        open_source(*args, **kwargs), images_at
    )


def write_indices(folder, indices):
    import jax

    with open(f"{folder}/{jax.process_index()}.{os.getpid()}", "a") as file:
        file.write(" ".join(map(str, np.asarray(indices))) + "\n")


def record(folder):
    def images_at(indices, images):
        write_indices(folder, indices)
        return images

    wrap_source(images_at)


def record_rows(folder):
    """`record` of documents, of which a row is an example."""
    from cfjax.data.document_rows import PackedDocuments

    length, rows_at = PackedDocuments.__len__, PackedDocuments.rows_at

    def recorded(documents, indices, positions):
        write_indices(folder, indices)
        return rows_at(documents, indices, positions)

    PackedDocuments.__len__ = lambda documents: min(length(documents), Wrapped.max_examples)
    PackedDocuments.rows_at = recorded


def record_epoch(folder):
    from cfjax import checkpoints

    Wrapped.max_examples = 112
    record(folder)
    record_rows(folder)
    save, restore = checkpoints.CheckpointWriter.save, checkpoints.restore_newest

    def saving(writer, state, *args):
        write_digest(folder, state, "saved")
        return save(writer, state, *args)

    def restoring(*args):
        restored = restore(*args)
        if restored is not None:
            write_digest(folder, restored[0], "restored")
        return restored

    checkpoints.CheckpointWriter.save, checkpoints.restore_newest = saving, restoring


def write_digest(folder, state, what):
    import jax
    from jax.experimental import multihost_utils

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        whole = np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        digest.update(f"{jax.tree_util.keystr(path)} {whole.dtype} {whole.shape}".encode())
        digest.update(whole.tobytes())
    if jax.process_index() == 0:
        with open(f"{folder}/{int(state.train_step)}.{what}", "w") as file:
            file.write(digest.hexdigest())


def nan(index):
    def images_at(indices, images):
        images = images.astype(np.float32)
        images[np.asarray(indices) == int(index)] = np.nan
        return images

    wrap_source(images_at)


def unreadable(process):
    batches = itertools.count()

    def images_at(_, images):
        import jax

        from cfjax.errors import UserError

        if jax.process_index() == int(process) and next(batches) >= 12:
            raise UserError("the disk of this process is gone; plug it in.")
        return images

    wrap_source(images_at)


def decode_late(_):
    from cfjax.data import image_folder

    image_folder._MAX_BYTES_IN_MEMORY = 0


def cloud(folder):
    import fake_cloud

    fake_cloud.install(folder)


def full_disk(train_step):
    from cfjax import checkpoints

    save = checkpoints.CheckpointWriter.save

    def saving(writer, state, *args):
        if int(state.train_step) == int(train_step):
            writer.wait()
            (_, hard) = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
        return save(writer, state, *args)

    checkpoints.CheckpointWriter.save = saving


if __name__ == "__main__":
    what, argument = sys.argv[1:3]
    del sys.argv[1:3]
    faults = (record, record_epoch, nan, unreadable, decode_late, cloud, full_disk)
    {fault.__name__: fault for fault in faults}[what](argument)
    runpy.run_module("cfjax.train", run_name="__main__", alter_sys=True)
