"""A real browser for tests: Debian's Chromium without a window, driven over its DevTools protocol."""

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tornado.httpclient import AsyncHTTPClient
from tornado.websocket import websocket_connect

# Whatever a page asks for elsewhere fails at once, and is seen.
_FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", "--remote-debugging-port=0",
]  # fmt: skip
_START_S, _ANSWER_S = 60.0, 120.0


def find_chromium() -> str | None:
    """Return the path of a browser that is installed, if there is one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """One page of a browser, and all that it asked for and complained of."""

    def __init__(self, program: str, folder: Path, size: tuple[int, int] = (1280, 900)) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = (folder / "chromium.log").open("wb+")
        command = [program, *_FLAGS, f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self._log)
        self._loop = asyncio.new_event_loop()
        self._ids = itertools.count(1)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        try:
            self._socket = self._run(self._connect(folder))
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.call(f"{domain}.enable")
            # What its workers and frames ask for is seen too.
            self.call("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)
            self.call(
                "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=False
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._process.kill()
        self._process.wait(30)
        self._log.close()
        self._loop.close()

    def _run(self, coroutine: Any) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(coroutine, _ANSWER_S))

    async def _connect(self, folder: Path) -> Any:
        deadline, file = time.monotonic() + _START_S, folder / "DevToolsActivePort"
        while not (file.exists() and file.read_text().count("\n")):
            assert self._process.poll() is None, f"the browser ended: {(folder / 'chromium.log').read_text()[-2000:]}"
            assert time.monotonic() < deadline, "the browser did not start"
            await asyncio.sleep(0.05)
        found = await AsyncHTTPClient().fetch(f"http://127.0.0.1:{file.read_text().split()[0]}/json")
        url = next(t["webSocketDebuggerUrl"] for t in json.loads(found.body) if t["type"] == "page")
        return await websocket_connect(url, max_message_size=2**28)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._run(self._call(method, parameters))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        number = next(self._ids)
        await self._socket.write_message(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(await self._socket.read_message())
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            await self._note(message)

    async def _note(self, event: dict[str, Any]) -> None:
        match event:
            case {"method": "Target.attachedToTarget", "params": {"sessionId": session}}:
                enable = {"id": next(self._ids), "method": "Network.enable", "sessionId": session}
                await self._socket.write_message(json.dumps(enable))
            case {"method": "Network.requestWillBeSent", "params": {"request": {"url": url}}}:
                self.requests.append(url)
            case {"method": "Runtime.exceptionThrown", "params": {"exceptionDetails": details}}:
                self.complaints.append(json.dumps(details)[:500])
            case {"method": "Runtime.consoleAPICalled", "params": {"type": "error" | "assert", "args": arguments}}:
                self.complaints.append(json.dumps(arguments)[:500])
            case {"method": "Log.entryAdded", "params": {"entry": {"level": "error"} as entry}}:
                self.complaints.append(f"{entry['text']} {entry.get('url', '')}")

    # -- what a person does

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 60.0) -> None:
        until = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < until, f"waited {seconds} s for {condition}; {self.complaints}"
            time.sleep(0.1)

    def screenshot(self, path: Path | None = None, *, whole: bool = False) -> bytes:
        data = base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])
        if path is not None:
            path.write_bytes(data)
        return data

    @property
    def strangers(self) -> set[str]:
        """Addresses outside this machine that the page asked for."""
        asked = [urlsplit(url) for url in self.requests]
        return {url.netloc for url in asked if url.scheme in ("http", "https", "ws") and url.hostname != "127.0.0.1"}
