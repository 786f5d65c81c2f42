"""What Open WebUI sends to manage the models of an Ollama, in the order of an administrator's afternoon.

Written down from its source (`backend/open_webui/routers/ollama.py`, 2026): verbs, paths, headers and the fields of
bodies are its own, the models are ours. Everything it does with an answer beyond passing it on stands in the replay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: Sent with everything when it forwards its users; the key is one that somebody typed in.
USER_HEADERS = {
    "Authorization": "Bearer sk-none-of-ours",
    "X-OpenWebUI-User-Name": "J%C3%BCrgen M%C3%BCller",
    "X-OpenWebUI-User-Id": "7d5c1e1c-4d0a-4f0e-9f57-1c7f0f0f0f0f",
    "X-OpenWebUI-User-Email": "admin@example.org",
    "X-OpenWebUI-User-Role": "admin",
}
JSON_HEADERS = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request; `{digest}` stands for the file that was uploaded."""

    method: str
    path: str
    body: Mapping[str, object] | None = None
    upload: bool = False
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: JSON_HEADERS | USER_HEADERS)


RECORDED = (
    # The connection is set up.
    Recorded("GET", "/api/version", headers=USER_HEADERS),
    Recorded("GET", "/api/version", headers={}),
    Recorded("GET", "/api/tags"),
    Recorded("GET", "/api/ps"),
    # A model is pulled by a name that was typed in, once it is known under both keys.
    Recorded("POST", "/api/pull", {"name": "hf.co/test/chat", "model": "hf.co/test/chat", "insecure": True}),
    Recorded("POST", "/api/pull", {"model": "hf.co/test/nope:latest", "insecure": True}),
    # A file is uploaded, and a model made of it.
    Recorded("POST", "/api/blobs/{digest}", upload=True, status=201, headers={}),
    Recorded("POST", "/api/create", {"model": "tiny", "files": {"tiny.gguf": "{digest}"}}),
    # A model is made in the model builder.
    Recorded("POST", "/api/create", {"model": "mario:latest", "from": "tiny:latest", "system": "You are Mario."}),
    Recorded("GET", "/api/tags"),
    Recorded("POST", "/api/show", {"model": "mario:latest"}),
    # Somebody chats; the list then shows what is loaded, and the administrator unloads it.
    Recorded(
        "POST",
        "/api/generate",
        {"model": "mario:latest", "prompt": "hi", "stream": False, "options": {"num_predict": 1}},
    ),
    Recorded("GET", "/api/ps"),
    Recorded("POST", "/api/generate", {"model": "mario:latest", "keep_alive": 0, "prompt": ""}),
    Recorded("GET", "/api/ps"),
    Recorded("POST", "/api/copy", {"source": "mario:latest", "destination": "mario:backup"}),
    Recorded("POST", "/api/push", {"model": "mario:latest", "insecure": True}, status=501),
    Recorded("DELETE", "/api/delete", {"name": "mario:latest", "model": "mario:latest"}),
    Recorded("DELETE", "/api/delete", {"model": "mario:latest"}, status=404),
    Recorded("GET", "/api/tags"),
)
