"""A stand-in for a vLLM server, which answers from OLMo2.generate: so the same rollouts must come out as in process.

server = serve(folder)      # its url; server.calls, server.fault, server.restart()
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

from model import OLMo2


def serve(folder, port=0, key="", names=("policy",), context=0):
    """A server of the model in a folder, in a thread. `fault(path, reply)` may change a reply, or return a status."""
    state = SimpleNamespace(model=OLMo2.load(folder), version="default", calls=[], fault=None)
    lock = threading.Lock()  # a model answers one row at a time

    def get(path):
        cards = [
            {"id": name, "max_model_len": context or state.model.config.context} for name in names
        ]
        replies = {"/version": {"version": "stub"}, "/v1/models": {"data": cards}}
        return (replies | {"/weight_info": {"weight_version": state.version}})[path]

    def post(path, body):
        if path == "/collective_rpc":
            state.model = OLMo2.load(body["kwargs"]["weights_path"])
        if path == "/update_weight_version":
            state.version = body["new_version"]
        if path != "/inference/v1/generate":
            return {"success": True}
        how = body["sampling_params"]
        (eos,) = how["stop_token_ids"] or (None,)
        (tokens,), (log_probs,) = state.model.generate(
            [body["token_ids"]],
            how["max_tokens"],
            how["temperature"],
            how["top_k"],
            how["top_p"],
            eos,
            [how["seed"]],
        )
        return {
            "choices": [
                {
                    "token_ids": tokens,
                    "logprobs": {"content": [{"logprob": value} for value in log_probs]},
                    "finish_reason": "stop" if tokens[-1] == eos else "length",
                    "weight_versions": [{"version": state.version, "start": 0, "end": len(tokens)}],
                }
            ]
        }

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
            path = self.path.split("?")[0]
            state.calls.append((path, body))
            with lock:  # a fault that changes weights and version, too, is one event
                reply, status = self.reply(path, body)
                changed = state.fault(path, reply) if state.fault else None
            status = changed if isinstance(changed, int) else status
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def reply(self, path, body):
            if key and self.headers.get("Authorization") != f"Bearer {key}":
                return {}, 401
            try:
                return get(path) if self.command == "GET" else post(path, body), 200
            except Exception as error:
                return {"error": str(error)}, 500

        do_GET = do_POST = answer

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    state.port = server.server_port

    def stop():
        server.shutdown()
        server.server_close()

    state.stop = stop
    return state
