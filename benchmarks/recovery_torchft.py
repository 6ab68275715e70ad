"""One replica of the rival torchft: plain data parallelism, its own all-reduce.

Started by `recovery_rivals.py` in a Python that has torch and torchft, and nothing of
shardkit's. The model has the sizes of `configs/tiny.toml`: a Llama over bytes. Prints a
line of JSON per event, with the time of the machine's clock.
"""

import argparse
import json
import time
from datetime import timedelta

START_S = time.time()

VOCAB, LAYERS, HEADS, WIDTH, MLP, LENGTH, ROWS = 256, 4, 4, 128, 384, 128, 24
DROPOUT = 0.1


def say(event, **fields):
    print(json.dumps({"event": event, "t": time.time(), **fields}), flush=True)


def build_model(torch):
    """A decoder of RMS norms, RoPE, SwiGLU and tied embeddings."""
    from torch import nn
    from torch.nn import functional as F

    head_dim = WIDTH // HEADS
    angles = torch.outer(
        torch.arange(LENGTH),
        10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim),
    )
    cos, sin = angles.cos(), angles.sin()

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
            self.out = nn.Linear(WIDTH, WIDTH, bias=False)
            self.up = nn.Linear(WIDTH, 2 * MLP, bias=False)
            self.down = nn.Linear(MLP, WIDTH, bias=False)

        def forward(self, x):
            q, k, v = (
                y.unflatten(-1, (HEADS, head_dim)).transpose(1, 2)
                for y in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
            )
            y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            y = self.out(y.transpose(1, 2).flatten(2))
            x = x + F.dropout(y, DROPOUT, self.training)
            gate, value = self.up(self.norms[1](x)).chunk(2, dim=-1)
            y = self.down(F.silu(gate) * value)
            return x + F.dropout(y, DROPOUT, self.training)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCAB, WIDTH)
            nn.init.normal_(self.embedding.weight, std=0.02)
            self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
            self.norm = nn.RMSNorm(WIDTH)

        def forward(self, tokens):
            x = self.embedding(tokens[:, :-1])
            x = F.dropout(x, DROPOUT, self.training)
            for block in self.blocks:
                x = block(x)
            logits = F.linear(self.norm(x), self.embedding.weight)
            return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return Model()


def make_manager(arguments, model, optimizer):
    import torch.distributed as dist
    import torchft

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    timeout = timedelta(seconds=arguments.timeout_s)

    def load(state):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    manager = torchft.Manager(
        pg=torchft.ProcessGroupGloo(timeout=timeout),
        load_state_dict=load,
        state_dict=lambda: {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        },
        min_replica_size=2,
        use_async_quorum=arguments.async_quorum,
        timeout=timeout,
        quorum_timeout=timedelta(seconds=60),
        connect_timeout=timeout,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=arguments.lighthouse,
        replica_id=f"replica-{arguments.replica}",
        hostname="127.0.0.1",
        heartbeat_interval=timedelta(milliseconds=arguments.heartbeat_ms),
    )
    return manager, store


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lighthouse", required=True)
    parser.add_argument("--replica", type=int, required=True)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--timeout-s", type=float, default=5)
    parser.add_argument("--heartbeat-ms", type=int, default=50)
    parser.add_argument("--async-quorum", action="store_true")
    arguments = parser.parse_args()
    say("started", start_s=START_S)
    import torch
    import torchft  # noqa: F401

    say("imported", torch=torch.__version__)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model(torch)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1
    )
    # What the optimizer keeps is there before the first step, to be overwritten by a
    # replica that has it already.
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    rates = [(group, group["lr"]) for group in optimizer.param_groups]
    for group, _ in rates:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in rates:
        group["lr"] = rate
    manager, _store = make_manager(arguments, model, optimizer)
    say("joined", num_params=sum(p.numel() for p in model.parameters()))
    train(torch, manager, model, optimizer, arguments)


def train(torch, manager, model, optimizer, arguments):
    rows = ROWS // arguments.replicas
    generator = torch.Generator().manual_seed(arguments.replica)
    parameters = list(model.parameters())
    while True:
        tokens = torch.randint(VOCAB, (rows, LENGTH + 1), generator=generator)
        optimizer.zero_grad()
        manager.start_quorum()
        loss = model(tokens)
        loss.backward()
        flat = torch.cat([p.grad.flatten() for p in parameters])
        manager.allreduce(flat).wait()
        pieces = flat.split([p.numel() for p in parameters])
        for p, g in zip(parameters, pieces, strict=True):
            p.grad = g.view_as(p)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        # Said before it is used up: a step that fails is counted by no one.
        participants = manager.num_participants()
        if manager.should_commit():
            optimizer.step()
            say("step", step=manager.current_step(), participants=participants)
        else:
            say("refused", step=manager.current_step())


if __name__ == "__main__":
    main()
