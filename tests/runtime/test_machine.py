"""What a machine says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.machine import cpu_name, graph_cache, products_saturate


@pytest.mark.parametrize(
    ("flags", "saturates"),
    [("sse2 avx2", True), ("avx2 avx512_vnni", False), ("avx2 avx_vnni", False)],
)
def test_a_cpu_says_whether_its_products_saturate(flags: str, saturates: bool, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nmodel name : x\nflags\t\t: fpu {flags}\n")
    assert products_saturate(cpuinfo) == saturates


def test_a_cpu_that_is_no_x86_does_not_saturate(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nFeatures : fp asimd\n")
    assert not products_saturate(tmp_path / "cpuinfo")
    assert not products_saturate(tmp_path / "nothing")


def test_a_cpu_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name : Some CPU @ 2 GHz\n")
    assert cpu_name(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz"
    assert cpu_name(tmp_path / "nothing")


def test_the_cache_is_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LATTE_FLOW_CACHE", str(tmp_path))
    assert graph_cache() == tmp_path / "graphs"
    monkeypatch.delenv("LATTE_FLOW_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert graph_cache() == tmp_path / "xdg" / "latte-flow" / "graphs"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LATTE_FLOW_CACHE", "~/cache")
    assert graph_cache() == tmp_path / "cache" / "graphs"


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("LATTE_FLOW_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert graph_cache() is None
