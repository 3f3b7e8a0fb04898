"""An engine for tests, slow and plain: the real model in torch, each text computed from its beginning for each token.

Its pages hold, for keys and values, what these are computed from: the token, its place, and whether it was given or
written. So whoever reads a wrong page, or one that was written in the wrong way, gets other logits or is stopped. As
in the real engine, given and written tokens differ in the last bits; here in more than those, so that it shows.
"""

import zlib

import numpy as np
import torch
import torch.nn.functional as F

from lexmill.inference.native.interface import BLOCK, CHUNK, Batch
from lexmill.inference.torch_backend import hidden_rows


class SlowEngine:
    """`lexmill.inference.native.interface.Engine`."""

    def __init__(self, network, pages=64, noise=0.1):
        self.network, self.config, self.pages, self.threads = network, network.config, pages, 1
        self.vocab_size, self.context = network.config.vocab_size, network.config.context
        self.held = np.full((pages, BLOCK, 3), -1)
        self.read = {}  # handle -> ids
        self._handles, self._scale = 0, noise
        self._known = {}

    def forward(self, batch: Batch):
        count = len(batch.tokens)
        assert count and {array.dtype for array in (batch.tokens, batch.positions, batch.rows)} == {
            np.dtype(np.int32)
        }
        assert batch.tables.dtype == batch.wanted.dtype == np.int32
        assert (np.diff(batch.rows) >= 0).all() and (
            np.diff(batch.positions)[np.diff(batch.rows) == 0] == 1
        ).all()
        assert count <= CHUNK
        assert (batch.memory is not None) == (self.config.shape == "encoder_decoder")
        places = batch.tables[batch.rows, batch.positions // BLOCK], batch.positions % BLOCK
        assert (places[0] >= 0).all()
        assert len(set(zip(*(part.tolist() for part in places)))) == count, "two texts write into one place"
        self.held[places] = np.stack([batch.tokens, batch.positions, np.full(count, batch.prompt)], 1)
        found = [self._logits(batch, int(index)) for index in batch.wanted]
        return np.stack(found) if found else np.zeros((0, self.vocab_size), np.float32)

    def _logits(self, batch, index):
        row, length = batch.rows[index], batch.positions[index] + 1
        pages = batch.tables[row, : -(-length // BLOCK)]
        tokens, places, given = self.held[pages].reshape(-1, 3)[:length].T
        assert places.tolist() == list(range(length)), "a page holds something else"
        memory = () if batch.memory is None else self.read[int(batch.memory[row])]
        key = tokens.tobytes(), given.tobytes(), tuple(memory)
        if key not in self._known:
            self._known[key] = self._compute(tokens.tolist(), memory) + self._noise(given)
        return self._known[key]

    def _compute(self, tokens, memory):
        with torch.inference_mode():
            ids = torch.tensor([tokens])
            if self.config.shape == "encoder_decoder":
                hidden = self.network.decode(ids, self.network.encode(torch.tensor([memory])))
            else:
                hidden = self.network.hidden(ids)
            return F.linear(hidden[:, -1], self.network.head_weight)[0].numpy()

    def _noise(self, given):
        random = np.random.default_rng(zlib.crc32(given.astype(np.uint8).tobytes()))
        return np.float32(self._scale) * random.standard_normal(self.vocab_size).astype(np.float32)

    def copy_pages(self, pairs):
        for source, target in pairs:
            self.held[target] = self.held[source]

    def hidden(self, texts, segments=None):
        if segments is None:
            return [hidden_rows(self.network, [text])[0] for text in texts]
        with torch.inference_mode():
            return [
                self.network.hidden(torch.tensor(np.array([text])), segments=torch.tensor(np.array([kinds])))[
                    0
                ].numpy()
                for text, kinds in zip(texts, segments)
            ]

    def remember(self, texts):
        handles = list(range(self._handles, self._handles + len(texts)))
        self._handles += len(texts)
        self.read |= dict(zip(handles, map(list, texts)))
        return handles

    def forget(self, handles):
        for handle in handles:
            del self.read[handle]

    def close(self):
        pass
