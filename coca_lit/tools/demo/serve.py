"""Serves the page to this machine only, with its style. Neither gradio nor the browser contacts another machine, and no
page of another name that resolves to this machine reads it.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response

from coca_lit.errors import ConfigError

HOST = "127.0.0.1"
MAX_UPLOAD = "30mb"
# The browser refuses requests of any library to another machine.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
FONTS = ["system-ui", "sans-serif"]
STYLE = Path(__file__).parents[2] / "assets" / "demo.css"
LOOK: dict[str, Any] = {  # arguments of `gr.Blocks.launch`, wherever the page is
    "ssr_mode": False,
    "max_file_size": MAX_UPLOAD,
    "footer_links": [],
    "theme": gr.themes.Soft(primary_hue="indigo", font=FONTS, font_mono=["ui-monospace", "monospace"]),
    "css": STYLE.read_text(encoding="utf-8"),
}


def serve(page: gr.Blocks, port: int | None, open_browser: bool = False, wait: bool = True) -> str:
    """Serves the page on 127.0.0.1 until the process is stopped, or in the background without `wait`.

    Args:
        port: None takes a free one.

    Returns:
        The address of the page.

    Raises:
        ConfigError: the port is taken, or none is free.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # logs each of our own requests
    try:
        _, address, _ = page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            quiet=True,
            **LOOK,
            app_kwargs={
                "middleware": [
                    Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False),
                    Middleware(BaseHTTPMiddleware, dispatch=_only_here),
                ]
            },
        )
    except OSError as error:
        if port is None:
            raise ConfigError(f"no port is free ({error}): choose one, e.g. port=9000") from error
        raise ConfigError(f"port {port} is taken; choose another one, e.g. port={port + 1}") from error
    print(f"the page is at {address} (Ctrl+C ends it)", flush=True)
    if wait:
        page.block_thread()
    return address


async def _only_here(request: Request, call_next: Callable[[Request], Any]) -> Response:
    response: Response = await call_next(request)
    response.headers["Content-Security-Policy"] = POLICY
    return response
