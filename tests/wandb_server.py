"""As much of a Weights & Biases server as wandb 0.31 asks for, in memory: runs, resuming, histories, files, tables."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote

KEY = "5ec2e7" + "0" * 34
"""The one API key that the server accepts."""


class Run:
    """What the server was told of a run."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.streams: dict[str, dict[int, str]] = {}  # by file and line: a line sent again takes its old place
        self.files: dict[str, bytes] = {}
        self.state = "running"

    def lines(self, name: str) -> list[Any]:
        """Of history, events or summary, in order."""
        lines = self.streams.get(f"wandb-{name}.json" + "l" * (name != "summary"), {})
        return [json.loads(line) for _, line in sorted(lines.items())]

    def bucket(self, name: str) -> dict[str, Any]:
        """All that wandb wants to know of a run that it creates or resumes."""
        history, events, summary = (self.lines(stream) for stream in ("history", "events", "summary"))
        texts = {
            "config": {key: {"value": value} for key, value in self.config.items()},
            "wandbConfig": {"t": 1},
            "summaryMetrics": (summary or [{}])[-1],
            "historyTail": [json.dumps(line) for line in history[-1:]],
            "eventsTail": [json.dumps(line) for line in events[-1:]],
        }
        counts = {"historyLineCount": len(history), "eventsLineCount": len(events)}
        counts["logLineCount"] = len(self.streams.get("output.log", ()))
        known = {"id": name, "name": name, "displayName": name, "tags": [], "notes": None, "project": PROJECT}
        return {**known, **counts, **{key: json.dumps(value) for key, value in texts.items()}}


PROJECT = {"id": "p", "name": "proj", "entity": {"id": "e", "name": "tester"}}
VIEWER = {"id": "u", "entity": "tester", "username": "tester", "flags": "{}", "teams": {"edges": []}}
SAME: dict[str, dict[str, Any]] = {
    "ArtifactType": {"project": {"artifact": None}},
    "CommitArtifact": {"commitArtifact": {"artifact": {"id": "a", "digest": ""}}},
    "OrganizationCoreWeaveOrganizationID": {"entity": {"organization": None}},
    "ServerFeaturesQuery": {"serverInfo": {"features": []}},
    "Viewer": {"viewer": VIEWER},
}
"""Data of the operations that are always answered alike."""


class Server(ThreadingHTTPServer):
    """Serves 127.0.0.1 within `with`. The status `fault` is the answer to everything, if there is one; 0 is silence.

    With `lost` it falls silent for good as soon as it is sent values of a run, whose first it does not take.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.runs: dict[str, Run] = {}
        self.artifacts: dict[str, dict[str, bytes]] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fault: int | None = None
        self.lost = False
        self.closed = threading.Event()

    def __enter__(self) -> Server:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closed.set()
        self.shutdown()
        self.server_close()

    def upload(self, *parts: str) -> dict[str, Any]:
        """Where a file is to be uploaded to: "runs" or "artifacts", name, file."""
        return {"id": "f", "uploadUrl": "/".join([self.url, *(quote(part, "") for part in parts)]), "uploadHeaders": []}

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any] | None:
        """The data of a GraphQL operation; None for one that is not known here."""
        name = str(given.get("name") or given.get("run"))
        if operation == "UpsertBucket":
            run, inserted = self.runs.setdefault(name, Run()), name not in self.runs
            if given.get("config"):
                run.config = {key: item["value"] for key, item in json.loads(given["config"]).items()}
            return {"upsertBucket": {"bucket": run.bucket(name), "inserted": inserted}}
        if operation == "RunResumeStatus":
            return {"model": {**PROJECT, "bucket": self.runs[name].bucket(name) if name in self.runs else None}}
        if operation == "CreateRunFiles":
            files = [{"name": file, **self.upload("runs", name, file)} for file in given["files"]]
            return {"createRunFiles": {"runID": name, "uploadHeaders": [], "files": files}}
        if operation == "CreateArtifact":
            name = given["input"]["artifactCollectionName"]
            self.artifacts.setdefault(name, {})
            return {"createArtifact": {"artifact": {"id": name, "state": "PENDING", "artifactSequence": {}}}}
        if operation == "CreateArtifactManifest":
            manifest = {"id": "m", "file": self.upload("artifacts", given["artifactID"], given["name"])}
            return {"createArtifactManifest": {"artifactManifest": manifest}}
        if operation == "CreateArtifactFiles":
            files = [(file["artifactID"], file["name"]) for file in given["input"]["artifactFiles"]]
            edges = [{"node": {**self.upload("artifacts", *file), "artifact": {"id": file[0]}}} for file in files]
            return {"createArtifactFiles": {"files": {"edges": edges}}}
        return SAME.get(operation)


class Handler(BaseHTTPRequestHandler):
    """GraphQL, file streams and uploads."""

    server: Server

    def parse_request(self) -> bool:
        """Returns False, which ends the request, when the server is to fail."""
        if not super().parse_request() or self.server.fault is None:
            return self.server.fault is None
        if self.server.fault:
            self.reply({"errors": [{"message": "the server fails"}]}, self.server.fault)
        else:
            self.server.closed.wait()
        return False

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        user = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic ")).decode()
        if user.partition(":")[2] != KEY:
            self.reply({"errors": [{"message": "user is not logged in"}]}, 401)
        elif self.path == "/graphql":
            operation = content.get("operationName") or content["query"].split("(")[0].split("{")[0].split()[-1]
            self.server.calls.append((operation, content.get("variables") or {}))
            data = self.server.answer(*self.server.calls[-1])
            self.reply({"data": data} if data is not None else {"errors": [{"message": f"no {operation} here"}]})
        elif self.server.lost and "wandb-history.jsonl" in (content.get("files") or {}):
            self.server.fault = 0
            self.server.closed.wait()
        else:  # /files/ENTITY/PROJECT/RUN/file_stream
            self.server.calls.append(("file_stream", content))
            run = self.server.runs[self.path.split("/")[-2]]
            for file, chunk in (content.get("files") or {}).items():
                run.streams.setdefault(file, {}).update(enumerate(chunk["content"], chunk["offset"]))
            if content.get("complete"):
                run.state = "failed" if content["exitcode"] else "finished"
            self.reply({})

    def do_PUT(self) -> None:
        kind, name, file = (unquote(part) for part in self.path[1:].split("/"))
        files = self.server.runs[name].files if kind == "runs" else self.server.artifacts[name]
        files[file] = self.rfile.read(int(self.headers["Content-Length"]))
        self.reply({})

    def reply(self, content: dict[str, Any], status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments: Any) -> None:
        """Nothing on the terminal."""
