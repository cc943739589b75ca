"""A headless Chromium, driven through chromedriver's own protocol (W3C WebDriver: JSON over HTTP), without a client."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request

import pytest

ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-extensions", "--disable-background-networking", "--window-size=1200,900",
)  # fmt: skip
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """One window."""

    def __init__(self, driver: str, chromium: str, folder) -> None:
        # Its own process group, so that ending it ends the browser that it started.
        self.log = (folder / "driver.log").open("wb+")
        self.process = subprocess.Popen(
            [driver, "--port=0"], stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.address = f"http://127.0.0.1:{self._port(folder / 'driver.log')}"
        options = {"binary": chromium, "args": [*ARGUMENTS, f"--user-data-dir={folder / 'profile'}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        try:
            made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        except BaseException:
            self._end()
            raise
        self.session = f"/session/{made['sessionId']}"

    def open(self, path) -> None:
        self.logs("browser"), self.logs("performance")
        self._ask("POST", f"{self.session}/url", {"url": path.absolute().as_uri()})

    def run(self, script: str, *arguments):
        """What a JavaScript function body returns."""
        return self._ask("POST", f"{self.session}/execute/sync", {"script": script, "args": list(arguments)})

    def later(self, script: str, *arguments):
        """What a script gives to the function that is its last argument."""
        return self._ask("POST", f"{self.session}/execute/async", {"script": script, "args": list(arguments)})

    def click(self, selector: str) -> None:
        found = self._ask("POST", f"{self.session}/element", {"using": "css selector", "value": selector})
        self._ask("POST", f"{self.session}/element/{found[ELEMENT]}/click", {})

    def press(self, selector: str, keys: str) -> None:
        """Focus an element and type."""
        self.run("document.querySelector(arguments[0]).focus()", selector)
        pressed = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        actions = [{"type": "key", "id": "keyboard", "actions": pressed}]
        self._ask("POST", f"{self.session}/actions", {"actions": actions})

    def logs(self, kind: str) -> list[dict]:
        """Entries since the last call."""
        return self._ask("POST", f"{self.session}/se/log", {"type": kind})

    def requested(self) -> list[str]:
        """Addresses asked for since the page was opened."""
        messages = [json.loads(entry["message"])["message"] for entry in self.logs("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def devtools(self, command: str, **values):
        return self._ask("POST", f"{self.session}/goog/cdp/execute", {"cmd": command, "params": values})

    def screenshot(self) -> bytes:
        return base64.b64decode(self._ask("GET", f"{self.session}/screenshot"))

    def close(self) -> None:
        try:
            self._ask("DELETE", self.session)
        finally:
            self._end()

    def _end(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        self.log.close()

    def _port(self, log) -> int:
        for _ in range(300):
            found = re.search(rb"successfully on port (\d+)", log.read_bytes())
            if found:
                return int(found[1])
            assert self.process.poll() is None, log.read_text()
            time.sleep(0.1)
        self._end()
        raise AssertionError(f"chromedriver does not say its port: {log.read_text()}")

    def _ask(self, method: str, path: str, content=None):
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        # Straight to the driver, whatever proxy the environment names.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(error.read().decode()) from None


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A window for all tests."""
    chromium, driver = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    if not chromium or not driver:
        missing = " and ".join(name for name, path in (("chromium", chromium), ("chromedriver", driver)) if not path)
        if os.environ.get("HSNET_NEEDS_CHROMIUM"):
            pytest.fail(f"no {missing} on PATH")
        pytest.skip(f"no {missing} on PATH (Debian: apt-get install chromium chromium-driver)")
    window = Browser(driver, chromium, tmp_path_factory.mktemp("browser"))
    yield window
    window.close()
