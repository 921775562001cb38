"""`gs://` without Google: objects are files of a folder, for fsspec and for tensorstore's requests.

As in the real one, folders exist only where objects do, objects are written as a whole, and nothing
can be appended or renamed in place.
"""

import http.server
import io
import json
import os
import threading
import urllib.parse
from pathlib import Path

import fsspec


def install(folder):
    """Takes over `gs://` in this process."""
    store = Store(folder)
    FakeCloud.store = store
    fsspec.register_implementation("gcs", FakeCloud, clobber=True)
    server = http.server.ThreadingHTTPServer(("localhost", 0), Requests)
    server.store = store
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://localhost:{server.server_port}"
    return store


class Store:
    """Objects by name, `bucket/path`."""

    def __init__(self, folder):
        self._folder = Path(folder)
        self._folder.mkdir(exist_ok=True)

    def _file(self, name):
        return self._folder / urllib.parse.quote(name, safe="")

    def names(self, prefix=""):
        names = (urllib.parse.unquote(path.name) for path in self._folder.iterdir())
        return sorted(name for name in names if name.startswith(prefix))

    def get(self, name):
        try:
            return self._file(name).read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            return None

    def generation(self, name):
        return str(self._file(name).stat().st_mtime_ns)

    def put(self, name, content):
        temporary = self._folder.parent / f"{threading.get_ident()}.tmp"
        temporary.write_bytes(content)
        temporary.replace(self._file(name))

    def delete(self, name):
        self._file(name).unlink()


class FakeCloud(fsspec.AbstractFileSystem):
    """What gcsfs would be."""

    protocol = ("gs", "gcs")
    cachable = False
    store: Store

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path).rstrip("/")
        if self.store.get(path) is not None:
            found = {path: "file"}
        else:
            found = {}
            for name in self.store.names(path + "/"):
                child, *deeper = name[len(path) + 1 :].split("/")
                found[f"{path}/{child}"] = "directory" if deeper else "file"
        if not found:
            raise FileNotFoundError(path)
        infos = [
            {"name": name, "type": kind, "size": len(self.store.get(name) or b"")}
            for name, kind in found.items()
        ]
        return infos if detail else list(found)

    def mkdir(self, path, **_):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def rmdir(self, path):
        pass

    def _rm(self, path):
        if self.store.get(path) is not None:  # else a folder
            self.store.delete(path)

    def cp_file(self, path1, path2, **_):
        source, target = map(self._strip_protocol, (path1, path2))
        content = self.store.get(source)
        if content is not None:
            self.store.put(target, content)

    def _open(self, path, mode="rb", **_):
        path = self._strip_protocol(path)
        if mode == "rb":
            content = self.store.get(path)
            if content is None:
                raise FileNotFoundError(path)
            return io.BytesIO(content)
        assert mode in ("wb", "xb"), f"objects can't be opened with mode {mode}"
        return Upload(self.store, path)


class Upload(io.BytesIO):
    def __init__(self, store, name):
        super().__init__()
        self._store, self._name = store, name

    def close(self):
        if not self.closed:
            self._store.put(self._name, self.getvalue())
        super().close()


class Requests(http.server.BaseHTTPRequestHandler):
    """The part of the JSON API that tensorstore uses."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _target(self):
        """Bucket, object and query of `[/upload]/storage/v1/b/BUCKET/o[/OBJECT]?QUERY`."""
        url = urllib.parse.urlsplit(self.path)
        query = {key: value[0] for key, value in urllib.parse.parse_qs(url.query).items()}
        parts = url.path.removeprefix("/upload").split("/")
        assert parts[:4] == ["", "storage", "v1", "b"] and parts[5] == "o", self.path
        name = urllib.parse.unquote(parts[6]) if len(parts) > 6 else query.get("name")
        return parts[4], name, query

    def _answer(self, code, content=b"", generation=None):
        self.send_response(code)
        if generation is not None:
            self.send_header("x-goog-generation", generation)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _describe(self, bucket, name):
        whole = f"{bucket}/{name}"
        return {
            "name": name,
            "size": str(len(self.server.store.get(whole))),
            "generation": self.server.store.generation(whole),
            "metageneration": "1",
            "timeCreated": "2020-01-01T00:00:00Z",
            "updated": "2020-01-01T00:00:00Z",
        }

    def do_GET(self):
        bucket, name, query = self._target()
        store = self.server.store
        if name is None:
            prefix = f"{bucket}/{query.get('prefix', '')}"
            names = [whole[len(bucket) + 1 :] for whole in store.names(prefix)]
            items = [
                self._describe(bucket, name)
                for name in names
                if query.get("startOffset", "") <= name
                and (not query.get("endOffset") or name < query["endOffset"])
            ]
            self._answer(200, json.dumps({"items": items}).encode())
            return
        content = store.get(f"{bucket}/{name}")
        if content is None:
            self._answer(404)
        elif query.get("alt") != "media":
            self._answer(200, json.dumps(self._describe(bucket, name)).encode())
        else:
            generation = store.generation(f"{bucket}/{name}")
            code, wanted = 200, self.headers.get("Range")
            if wanted:
                begin, end = wanted.removeprefix("bytes=").split("-")
                code = 206
                size = len(content)
                stop = int(end) + 1 if end else size
                content = content[int(begin) : stop]
                self.send_response(code)
                self.send_header("x-goog-generation", generation)
                self.send_header(
                    "Content-Range", f"bytes {begin}-{int(begin) + len(content) - 1}/{size}"
                )
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                return
            self._answer(code, content, generation)

    def do_POST(self):
        bucket, name, query = self._target()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        whole = f"{bucket}/{name}"
        if query.get("ifGenerationMatch") == "0" and self.server.store.get(whole) is not None:
            self._answer(412)
            return
        self.server.store.put(whole, content)
        self._answer(200, json.dumps(self._describe(bucket, name)).encode())

    def do_DELETE(self):
        bucket, name, _ = self._target()
        try:
            self.server.store.delete(f"{bucket}/{name}")
            self._answer(204)
        except FileNotFoundError:
            self._answer(404)
