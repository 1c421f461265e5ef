"""The live page, and reports, in headless Chromium, driven by the DevTools protocol over a pipe (standard library only)."""

import base64
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time

chromium, mindseye, root, shots = sys.argv[1:5]
failures = []


def check(name, value, detail=""):
    print(f"{'ok' if value else 'FAILED'}: {name}{'' if value else f' ({detail})'}", flush=True)
    if not value:
        failures.append(name)


class Browser:
    def __init__(self, profile):
        to_browser, our_write = os.pipe()
        our_read, from_browser = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
                 "--disable-dev-shm-usage", f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]

        def ends():
            # Chromium reads from 3 and writes to 4. The copies come first: either number may be in use.
            a, b = os.dup(to_browser), os.dup(from_browser)
            os.dup2(a, 3)
            os.dup2(b, 4)

        self.process = subprocess.Popen([chromium, *flags], pass_fds=(3, 4, to_browser, from_browser), preexec_fn=ends,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self.read_end, self.write_end = our_read, our_write
        self.buffer, self.number, self.session, self.errors = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.fetched = []
        for domain in ["Page", "Runtime", "Log", "Network"]:
            self.call(f"{domain}.enable")

    def message(self, timeout=60):
        until = time.time() + timeout
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read_end], [], [], max(until - time.time(), 0))
            if not ready:
                raise TimeoutError("the browser says nothing")
            self.buffer += os.read(self.read_end, 1 << 20)
        text, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(text)

    def call(self, method, **params):
        self.number += 1
        request = {"id": self.number, "method": method, "params": params}
        if self.session:
            request["sessionId"] = self.session
        os.write(self.write_end, json.dumps(request).encode() + b"\0")
        while True:
            message = self.message()
            if message.get("id") == self.number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            if message.get("method") == "Network.requestWillBeSent":
                self.fetched.append(message["params"]["request"]["url"])
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(message["params"]["exceptionDetails"])[:400])
            if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.errors.append(message["params"]["entry"]["text"] + " " + message["params"]["entry"].get("url", ""))

    def js(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait(self, expression, seconds=60):
        until = time.time() + seconds
        while time.time() < until:
            try:
                if self.js(expression):
                    return True
            except RuntimeError:
                pass  # the page is on its way
            time.sleep(0.05)
        return False

    def key(self, key, code, number=0, text=""):
        more = {"text": text} if text else {}
        for kind in ["keyDown", "keyUp"]:
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=code, windowsVirtualKeyCode=number,
                      **(more if kind == "keyDown" else {}))

    def tab_to(self, element):
        for _ in range(40):
            if self.js(f"document.activeElement.id === '{element}'"):
                return True
            self.key("Tab", "Tab", 9)
        return False

    def ask(self, words):
        """By the keyboard alone."""
        reached = self.tab_to("text")
        self.js("document.activeElement.select()")
        self.call("Input.insertText", text=words)
        self.key("Enter", "Enter", 13, "\r")
        return reached

    def size(self, width, height):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def scheme(self, name):
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def shot(self, name):
        if shots:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
            data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
            with open(os.path.join(shots, name), "wb") as out:
                out.write(base64.b64decode(data))

    def close(self):
        self.process.terminate()
        self.process.wait(20)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(*arguments, cwd):
    log = open(os.path.join(cwd, "log"), "ab")
    return subprocess.Popen([mindseye, *arguments, "--bundle", f"{root}/models/house-tiny"], cwd=cwd, stderr=log,
                            stdout=log)


def stop(process):
    process.send_signal(signal.SIGINT)
    try:
        return process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        return None


OVER = "state.live && state.live.over && state.live.words === {} && state.live.answer.status"


def over(browser, words, seconds=120):
    """Waits for the end of a goal; gives its status."""
    browser.wait(OVER.format(json.dumps(words)), seconds)
    return browser.js(OVER.format(json.dumps(words)))


def demo(browser, port, work):
    process = start("demo", f"--view=127.0.0.1:{port}", "--out", work, "--report", f"{work}/demo.html", cwd=work)
    try:
        browser.size(1100, 800)
        browser.scheme("dark")
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        browser.call("Page.navigate", url=f"http://127.0.0.1:{port}/")
        check("the page loads and connects", browser.wait("$('link') && $('link').textContent === 'connected'"))
        check("camera pictures come", browser.wait("$('camera').naturalWidth > 0"))
        check("moments are remembered", browser.wait("document.querySelectorAll('#memory figure').length >= 3"))
        # Freezes the page in the middle of the goal, for the picture; what comes meanwhile is heard afterwards.
        browser.js("""window.heard = []; window.passOn = hear;
            hear = (m) => { if (window.frozen) heard.push(m); else { passOn(m);
              if (state.live && !state.live.over && state.drives.size >= 2) window.frozen = true; } }""")
        during = browser.wait("window.frozen && state.drives.size >= 2", 120)
        check("a drive is shown while it is imagined", during, browser.js("JSON.stringify(state.live)"))
        browser.js("new Promise((done) => setTimeout(done, 600))")
        check("and the page says what is being done", browser.js("$('verdict').textContent").startswith("Working: "),
              browser.js("$('verdict').textContent"))
        browser.shot("view-goal.png")
        browser.js("window.frozen = false; hear = passOn; heard.forEach(passOn)")
        check("the answer comes in words", browser.wait("$('verdict').textContent.startsWith('Found: stand at x ')", 60),
              browser.js("$('verdict').textContent"))
        check("one candidate is marked as chosen",
              browser.wait("document.querySelectorAll('#candidates figure.used').length === 1", 20))
        check("consistency and its parts", browser.js("$('consistency').textContent > '0' && $('parts').children.length === 4"))
        check("moments that were used are framed", browser.wait("document.querySelectorAll('#memory figure.used').length > 3"))
        check("the map has the way driven and the imagined one",
              browser.js("state.map.path.length > 10 && state.live.imagined.length > 3"))
        check("the newest picture's age is told", browser.wait("$('counts').textContent.includes('newest picture')"))
        browser.wait("state.status.node && state.status.node.frames.age_ms < 2000")
        time.sleep(8)  # the drive

        check("the keyboard reaches the field", browser.ask("find the purple zebra"))
        status = over(browser, "find the purple zebra")
        check("an unknown word is refused", status == "failed", status)
        check("with the reason", "zebra" in browser.js("$('reason').textContent"), browser.js("$('reason').textContent"))
        browser.shot("view-refused.png")

        html = "<img src=x onerror=\"document.title='broken'\"> red chair"
        browser.ask(html)
        over(browser, html)
        check("HTML in a goal is text", browser.js("$('asked').textContent").endswith(f"“{html}”"))
        check("and makes no element", browser.js("document.querySelectorAll('#asked img').length") == 0
              and browser.js("document.title") == "mindseye")
        browser.ask("x" * 3000)
        check("the field holds no more than a goal may have", browser.js("$('text').value.length") == 1000
              or browser.wait("$('reply').textContent.includes('at most 1000')", 10))

        # Back through the goals, by the arrow keys.
        browser.wait("state.history.length >= 3")
        check("the keyboard reaches past goals", browser.tab_to("past"))
        browser.key("Home", "Home", 36)
        check("the first goal is shown again", browser.wait("state.shown && $('verdict').textContent.startsWith('Found')", 20),
              browser.js("$('pastnote').textContent"))
        check("with its drives", browser.wait("document.querySelectorAll('#candidates figure').length >= 2"))
        browser.key("End", "End", 35)
        check("and left again", browser.wait("!state.shown", 10))

        browser.ask("find the purple table")
        status = over(browser, "find the purple table")
        check("a goal that is asked on the page is answered", status in ("found", "inconsistent", "not_in_context"), status)
        browser.size(400, 800)
        browser.scheme("light")
        browser.js("window.dispatchEvent(new Event('resize'))")
        time.sleep(1)
        wide = browser.js("document.documentElement.scrollWidth")
        check("nothing is wider than a phone", wide <= 400, wide)
        small = browser.js("""[...document.querySelectorAll('button, input')].filter((e) => e.offsetParent
            && e.getBoundingClientRect().height < 24).map((e) => e.id)""")
        check("everything can be touched", not small, small)
        browser.shot("view-phone.png")
        unnamed = browser.js("""[...document.querySelectorAll('button, input, canvas, img')].filter((e) =>
            !(e.textContent.trim() || e.getAttribute('aria-label') || e.alt || (e.labels && e.labels.length))).length""")
        check("every control and picture has a name", unnamed == 0, unnamed)
        browser.size(1100, 800)
    finally:
        ended = stop(process)
    check("the demo ends when it is told", ended == 0, ended)


def restart(browser, port, work):
    """The same address served by another process: the page comes back by itself."""
    check("the page says that the runtime is gone", browser.wait("$('link').classList.contains('lost')", 20))
    errors = len(browser.errors)
    bag = f"{root}/tests/data/runtime/room.mcap"
    process = start("replay", bag, "--goal", "find the yellow cone", f"--view=127.0.0.1:{port}",
                    "--report", f"{work}/replay.html", cwd=work)
    try:
        check("it connects again", browser.wait("$('link').textContent === 'connected'", 60))
        check("and shows the other runtime's goal", browser.wait("$('robot').textContent.startsWith('replay')", 60))
        check("with its answer", browser.wait("state.live && state.live.over && state.live.number === 1", 120))
        browser.ask("find the blue box")
        status = over(browser, "find the blue box")
        check("a bag answers what is asked on the page", status in ("found", "inconsistent", "not_in_context"), status)
    finally:
        check("replay ends when it is told", stop(process) == 0)
    # A browser writes every connection that is refused into its console.
    del browser.errors[errors:]


def report(browser, path, goals):
    """A report opens from the disk, without a network, and says what the page said."""
    name = os.path.basename(path)
    check(f"{name} is there", os.path.exists(path))
    size = os.path.getsize(path)
    check(f"{name} is under 5 MB", size < 5_000_000, size)
    browser.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    browser.size(1100, 800)
    browser.scheme("light")
    browser.errors, browser.fetched = [], []
    browser.call("Page.navigate", url=f"file://{path}")
    check("it opens", browser.wait("state.report && state.live && state.live.over", 20))
    check("it names itself", browser.js("document.title") == "mindseye: report")
    check("it has the answer in words", browser.js("$('verdict').textContent") not in ("", "Waiting ..."))
    check("and what it rests on", browser.js("$('evidence').children.length") >= 3)
    check("candidates are side by side, one chosen", browser.wait("""document.querySelectorAll('#candidates figure').length >= 2
          && document.querySelectorAll('#candidates figure.used').length === 1""", 10), browser.js("$('candidates').textContent"))
    check("picture by picture", browser.js("$('explained').children.length") >= 3)
    check("the map has a way", browser.js("state.map.path.length") > 10)
    check("there is no field to ask in", browser.js("$('ask').hidden"))
    check("the command is there", browser.js("$('command').textContent").startswith("mindseye "))
    check("with hashes and versions", browser.js("$('facts').textContent.includes('SHA-256')"))
    check("the recording is there", browser.wait("$('video').naturalWidth > 0", 10) and browser.js("state.video.frames.length") > 20)
    check("the keyboard plays it", browser.tab_to("videoplay"))
    before = browser.js("state.videoAt")
    browser.key(" ", "Space", 32, " ")
    check("and it moves", browser.wait(f"state.videoAt > {before} + 3", 10))
    check("imagined pictures stand beside those that were really seen",
          browser.wait("$('seennote').textContent.startsWith('seen: ')", 20), browser.js("$('seennote').textContent"))
    browser.shot(name.replace(".html", "-report.png"))
    if goals > 1:
        check("the keyboard reaches past goals", browser.tab_to("past"))
        browser.key("Home", "Home", 36)
        check("which are in the file", browser.wait("state.shown !== null", 10), browser.js("$('pastnote').textContent"))
        browser.key("End", "End", 35)
    browser.size(400, 800)
    browser.scheme("dark")
    browser.js("window.dispatchEvent(new Event('resize'))")
    time.sleep(0.5)
    wide = browser.js("document.documentElement.scrollWidth")
    check("it is no wider than a phone", wide <= 400, wide)
    browser.shot(name.replace(".html", "-report-phone.png"))
    elsewhere = [url for url in browser.fetched if not url.startswith(("file:", "data:"))]
    check("nothing is fetched", not elsewhere, elsewhere)
    check("no error in the console", not browser.errors, browser.errors)
    browser.call("Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1)


def main():
    with tempfile.TemporaryDirectory() as work:
        browser = Browser(os.path.join(work, "profile"))
        try:
            port = free_port()
            demo(browser, port, work)
            browser.errors = [e for e in browser.errors if "WebSocket connection" not in e and "ERR_CONNECTION" not in e]
            check("no error in the browser's console", not browser.errors, browser.errors)
            restart(browser, port, work)
            report(browser, f"{work}/demo.html", 4)
            report(browser, f"{work}/replay.html", 2)
        finally:
            browser.close()
            if failures:
                with open(os.path.join(work, "log"), encoding="utf-8", errors="replace") as log:
                    print(re.sub(r"\x1b\[[0-9;]*m", "", log.read())[-3000:])
    print(f"{len(failures)} failed" if failures else "the page works in a browser")
    sys.exit(1 if failures else 0)


main()
