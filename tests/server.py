"""ComfyUI's own server as a process on loopback, and the little that a test says to it."""
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path


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
        (base / "custom_nodes" / "ComfyUI-MTEO").symlink_to(pack, target_is_directory=True)
        command = [sys.executable, str(comfyui / "main.py"), "--cpu", "--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(base),
                   "--disable-all-custom-nodes", "--whitelist-custom-nodes", "ComfyUI-MTEO", "--front-end-root", str(base / "web"), "--preview-method", "latent2rgb"]
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

    def queue(self, graph: dict) -> dict:
        """Post an API graph and wait for its history entry; a refused graph gives {"refused": ...}."""
        request = urllib.request.Request(self.url("/prompt"), json.dumps({"prompt": graph}).encode(), {"Content-Type": "application/json"})
        try:
            number = json.loads(urllib.request.urlopen(request, timeout=30).read())["prompt_id"]
        except urllib.error.HTTPError as error:
            return {"refused": json.loads(error.read())}
        for _ in range(1200):
            history = json.loads(self.get(f"/history/{number}"))
            if number in history:
                return history[number]
            time.sleep(0.1)
        raise TimeoutError("the prompt did not end in two minutes")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)
