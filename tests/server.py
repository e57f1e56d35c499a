"""ComfyUI's own server as a process on loopback, and the little that a test says to it."""
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import websocket


class Server:
    """One `main.py --cpu` with only this pack, in a folder of its own; `stop` ends exactly this process."""

    def __init__(self, comfyui: Path, base: Path, pack: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.base, self.log = base, base / "server.log"
        for folder in ("custom_nodes", "web", "user", "models/mteo"):
            (base / folder).mkdir(parents=True)
        (base / "web" / "index.html").write_text("<html></html>")
        own = base / "custom_nodes" / "ComfyUI-MTEO"
        try:
            own.symlink_to(pack, target_is_directory=True)
        except OSError:  # Windows, for all but administrators and developers
            shutil.copytree(pack, own, ignore=shutil.ignore_patterns(".*", "runs"))
        command = [sys.executable, str(comfyui / "main.py"), "--cpu", "--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(base)]
        command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", "ComfyUI-MTEO", "--front-end-root", str(base / "web")]
        command += ["--preview-method", "latent2rgb"]
        self.process = subprocess.Popen(command, stdout=self.log.open("w"), stderr=subprocess.STDOUT, cwd=base)
        for _ in range(600):
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}")

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def get(self, path: str) -> bytes:
        return urllib.request.urlopen(self.url(path), timeout=30).read()

    def post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(self.url(path), json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            return json.loads(urllib.request.urlopen(request, timeout=30).read() or "{}")
        except urllib.error.HTTPError as error:
            return {"refused": json.loads(error.read())}

    def queue(self, graph: dict, seconds: int = 600) -> dict:
        """Post an API graph and wait for its history entry; a refused graph gives {"refused": ...}."""
        answer = self.post("/prompt", {"prompt": graph})
        if "refused" in answer:
            return answer
        for _ in range(seconds * 10):
            history = json.loads(self.get(f"/history/{answer['prompt_id']}"))
            if answer["prompt_id"] in history:
                return history[answer["prompt_id"]]
            time.sleep(0.1)
        raise TimeoutError(f"the prompt did not end in {seconds} seconds")

    def watch(self, graph: dict, told=None) -> tuple[dict, list]:
        """Post over HTTP and follow on the websocket: (history entry, messages; a preview is the bytes of its frame).
        told(message) is called for each."""
        client, messages = uuid.uuid4().hex, []
        socket_ = websocket.create_connection(self.url(f"/ws?clientId={client}").replace("http", "ws", 1), timeout=240)
        try:
            number = self.post("/prompt", {"prompt": graph, "client_id": client, "extra_data": {"preview_method": "latent2rgb"}})["prompt_id"]
            while True:
                frame = socket_.recv()
                message = frame if isinstance(frame, bytes) else json.loads(frame)
                messages.append(message)
                if told:
                    told(message)
                if (
                    isinstance(message, dict)
                    and message["type"] in ("execution_success", "execution_error", "execution_interrupted")
                    and message["data"]["prompt_id"] == number
                ):
                    break
        finally:
            socket_.close()
        for _ in range(100):
            history = json.loads(self.get(f"/history/{number}"))
            if number in history:
                return history[number], messages
            time.sleep(0.1)
        raise TimeoutError("the prompt ended without a history entry")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)
