"""A Hugging Face Hub on 127.0.0.1 for tests: in memory, standard library only, strict.

    def test_push(hub, tmp_path):                             # the fixture of `loopback_hub.clients`
        tlr.push_to_hub(model, "alice/tiny")                  # the real client, over real HTTP
        assert "model.safetensors" in hub.repo("alice/tiny").files()
        hub.fail("POST", "/commit/", status=500)              # and now the next commit fails

It answers what pushing and pulling a model asks for as the real Hub does, and refuses wrong tokens, private
repositories, commits on another parent and bad cards as that does. What the server does not know is answered with 404
and kept in `hub.unexpected`, and the fixture fails the test for it: tags, pull requests, quotas, gates.

`hub`      what it holds, what it has seen and what tests ask of it; the endpoints, what they refuse, and HTTP
`xet`      the storage that hf_xet uses where it is switched on
`clients`  the real clients turned towards a hub, every other address closed to them, and the pytest fixtures
"""

from loopback_hub.hub import LoopbackHub

__all__ = ["LoopbackHub"]
