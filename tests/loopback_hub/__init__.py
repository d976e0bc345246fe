"""A Hugging Face Hub on 127.0.0.1 for tests: in memory, standard library only, strict.

    def test_push(hub, tmp_path):                             # the fixture of `loopback_hub.fixtures`
        tlr.push_to_hub(model, "alice/tiny")                  # the real client, over real HTTP
        assert "model.safetensors" in hub.repo("alice/tiny").files()
        hub.fail("POST", "/commit/", status=500)              # and now the next commit fails

What a client asks for is answered as the real Hub answers it, or refused as the real Hub refuses it. What the server
does not know is answered with 404 and kept in `hub.unexpected`, and the fixture fails the test for it.

`state`     one hub: what it holds, what it has seen, what tests ask of it
`content`   what a repository holds: files, commits, branches and tags
`rules`     what the Hub refuses: names, paths, cards, files too large to sit in a commit
`faults`    failures on request: a status, a lost connection, a wrong byte, a delay
`protocol`  requests, answers, and who may read and write
`reading`   the endpoints that change nothing
`writing`   the endpoints through which repositories and files come in
`server`    HTTP itself
`xet`       the storage that hf_xet uses where it is switched on
`clients`   the real clients turned towards a hub, and every other address closed to them
`fixtures`  the pytest fixtures `hub`, `xet_hub` and `waits`
"""

from loopback_hub.state import Call, LoopbackHub

__all__ = ["Call", "LoopbackHub"]
