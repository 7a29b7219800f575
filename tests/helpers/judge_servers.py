"""OpenAI-compatible endpoints on loopback, whose model is a function."""

import contextlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def judge_server(
    reply: Callable[[str], str | dict], status: Callable[[dict], int] = lambda body: 200, error: str = "no"
):
    """
    Yield the address of an endpoint, and the requests that it got.

    Args:
        reply (`Callable`): from the user's turn to the model's text, or to the whole choice.
        status (`Callable`): from a request to the status of its answer.
        error (`str`): content of an answer with another status than 200.
    """
    requests: list[dict] = []

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(body)
            code, content = status(body), {"error": error}
            if code == 200:
                given = reply(body["messages"][0]["content"])
                choice = given if isinstance(given, dict) else {"message": {"content": given}, "finish_reason": "stop"}
                content = {"choices": [choice]}
            answer = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
