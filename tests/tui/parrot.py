"""A server of OpenAI's form that says the last question again: `python -P parrot.py PORT`, which tells its port.

A process of its own, started anew: one that is forked off a program with threads may hold their locks for ever.
"""

from __future__ import annotations

import json
import socketserver
import sys

MODELS = [
    {"id": "parrot", "max_model_len": 1000}, {"id": "raven", "max_model_len": 500},
    {"id": "poet", "parent": "parrot"},
]  # fmt: skip


class Handler(socketserver.StreamRequestHandler):
    """One model, which says the last question again."""

    def handle(self) -> None:
        length, line = 0, self.rfile.readline()
        while header := self.rfile.readline().strip().lower():
            if header.startswith(b"content-length:"):
                length = int(header.split(b":")[1])
        body = json.loads(self.rfile.read(length)) if length else {}
        kind = "application/json"
        if b"/models" in line:
            answer = json.dumps({"data": MODELS})
        else:
            kind = "text/event-stream"
            said = f"{body['model']} heard: {body['messages'][-1]['content']}"
            piece = {"choices": [{"index": 0, "delta": {"content": said}, "finish_reason": None}]}
            end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
            answer = f"data: {json.dumps(piece)}\n\ndata: {json.dumps(end)}\n\ndata: [DONE]\n\n"
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n"
        self.wfile.write((head + answer).encode())


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True


if __name__ == "__main__":
    with Server(("127.0.0.1", int(sys.argv[1])), Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
