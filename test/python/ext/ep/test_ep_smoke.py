"""What needs one rank only: Config, size hints, construction, the statics, the package itself."""

import copy
import inspect
import os
import pickle
import subprocess
import sys

import pytest
import torch
from checks import World, round_trip
from reference import Shape

import mscclpp.ext
from mscclpp.ext import ep

FIELDS = (
    "num_sms",
    "num_max_nvl_chunked_send_tokens",
    "num_max_nvl_chunked_recv_tokens",
    "num_max_rdma_chunked_send_tokens",
    "num_max_rdma_chunked_recv_tokens",
)


def test_ext_imports_ep():
    assert mscclpp.ext.ep is ep


def test_config_defaults():
    assert [getattr(ep.Config(), field) for field in FIELDS] == [20, 6, 256, 6, 256]


def test_config_round_trip():
    values = (11, 7, 300, 8, 400)
    by_name = ep.Config(**dict(zip(FIELDS, values)))
    assert tuple(getattr(by_name, field) for field in FIELDS) == values
    assert by_name == ep.Config(*values) and hash(by_name) == hash(ep.Config(*values))
    assert by_name != ep.Config() and by_name != 3
    assert pickle.loads(pickle.dumps(by_name)) == by_name
    assert copy.deepcopy(by_name) == by_name
    assert eval(repr(by_name), {"Config": ep.Config}) == by_name


@pytest.mark.parametrize("field", FIELDS)
def test_config_refuses(field):
    with pytest.raises(ep.EpInvalidArgument, match=f"Config.{field} = 0 must be at least 1"):
        ep.Config(**{field: 0})


def test_size_hints():
    small, large = ep.Config(8, 6, 128), ep.Config(24, 6, 512)
    for ranks in (1, 2, 3, 8, 100):
        hint = small.get_nvl_buffer_size_hint(7168 * 2, ranks)
        assert isinstance(hint, int) and 0 < hint < large.get_nvl_buffer_size_hint(7168 * 2, ranks)
        assert hint < small.get_nvl_buffer_size_hint(7168 * 4, ranks)
        rdma = small.get_rdma_buffer_size_hint(hidden_bytes=7168 * 2, num_ranks=ranks)
        assert rdma == 0 if ranks <= 8 else rdma > 1000 * 7168 * 2
    with pytest.raises(ValueError, match="ranks = 0"):
        small.get_nvl_buffer_size_hint(7168, 0)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8, 9, 16, 100, 160, 1000])
def test_recommended_configs_for_any_number_of_ranks(ranks):
    for config in (ep.Buffer.get_dispatch_config(ranks), ep.Buffer.get_combine_config(ranks)):
        assert config.num_sms == ep.Buffer.num_sms
    if ranks == 8:  # deep_ep's numbers
        assert ep.Buffer.get_dispatch_config(8) == ep.Config(ep.Buffer.num_sms, 6, 256, 6, 128)
        assert ep.Buffer.get_combine_config(8) == ep.Config(ep.Buffer.num_sms, 4, 256, 6, 128)


def test_set_num_sms():
    before = ep.Buffer.num_sms
    try:
        ep.Buffer.set_num_sms(7)
        assert ep.Buffer.num_sms == ep.Buffer.get_dispatch_config(4).num_sms == 7
        with pytest.raises(ValueError):
            ep.Buffer.set_num_sms(0)
        assert ep.Buffer.num_sms == 7
    finally:
        ep.Buffer.set_num_sms(before)


def test_construction(solo):
    buffer = ep.Buffer(None, 1 << 20, comm=solo.comm, device=solo.device, timeout=5)
    assert (buffer.rank, buffer.group_size, buffer.group) == (0, 1, solo.comm)
    assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (1 << 20, 0)
    assert buffer.low_latency_mode is False and buffer.device == solo.device
    assert buffer.runtime is not None
    buffer.destroy()
    assert buffer.runtime is None
    buffer.destroy()


def test_construction_over_a_torch_group(tmp_path, solo):
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        buffer = ep.Buffer(dist.group.WORLD, 1 << 20, device=solo.device)
        assert buffer.group is dist.group.WORLD and buffer.group_size == 1
        buffer.destroy()
    finally:
        dist.destroy_process_group()


def test_construction_with_a_bootstrap(solo):
    """No torch.distributed, no MPI: any collective will do."""
    calls = []

    def all_gather(data):
        calls.append(len(data))
        return [data]

    bootstrap = ep._cpp.callback_bootstrap(0, 1, all_gather)
    assert bootstrap.all_gather(b"xyz") == [b"xyz"]
    buffer = ep.Buffer(num_nvl_bytes=1 << 20, bootstrap=bootstrap, device=solo.device)
    assert buffer.group is None and len(calls) > 1
    round_trip(buffer, solo, World(Shape((9,))))
    buffer.destroy()


def test_a_bad_callback_is_an_error():
    bootstrap = ep._cpp.callback_bootstrap(0, 2, lambda data: [data])
    with pytest.raises(ep.EpInvalidArgument, match="returned 1 pieces for 2 ranks"):
        bootstrap.all_gather(b"x")

    def broken(data):
        raise KeyError("from the callback")

    with pytest.raises(KeyError, match="from the callback"):
        ep._cpp.callback_bootstrap(0, 2, broken).all_gather(b"x")


HARMLESS = {
    "num_rdma_bytes": 1 << 30,
    "num_qps_per_rank": 1,
    "allow_nvlink_for_low_latency_mode": False,
    "allow_mnnvl": True,
    "use_fabric": True,
    "explicitly_destroy": True,
    "enable_shrink": False,
}


@pytest.mark.parametrize("option", HARMLESS)
def test_deep_ep_options_that_mean_nothing_here(solo, option):
    with solo.buffer(**{option: HARMLESS[option]}) as buffer:
        round_trip(buffer, solo, World(Shape((9,))))


def test_what_does_not_exist_is_refused_by_name(solo):
    with solo.buffer() as buffer:
        for name in ("internode_dispatch", "internode_combine"):
            with pytest.raises(ep.EpUnsupported, match=name) as caught:
                getattr(buffer, name)(1, handle=None)
            assert isinstance(caught.value, NotImplementedError)
            assert isinstance(caught.value, ep.EpError) and caught.value.code == "unsupported"
        with pytest.raises(ep.EpUnsupported, match="empty_in_pool"):
            buffer.get_local_buffer_tensor(torch.uint8)


# deep_ep's signatures, by hand: name = default, in order.
SIGNATURES = {
    "__init__": "group num_nvl_bytes=0 num_rdma_bytes=0 low_latency_mode=False num_qps_per_rank=24 "
    "allow_nvlink_for_low_latency_mode=True allow_mnnvl=False explicitly_destroy=False "
    "enable_shrink=False comm=None",
    "get_dispatch_layout": "topk_idx num_experts previous_event=None async_finish=False "
    "allocate_on_comm_stream=False",
    "dispatch": "x handle=None num_tokens_per_rank=None num_tokens_per_rdma_rank=None "
    "is_token_in_rank=None num_tokens_per_expert=None topk_idx=None topk_weights=None "
    "expert_alignment=1 num_worst_tokens=0 config=None previous_event=None async_finish=False "
    "allocate_on_comm_stream=False",
    "combine": "x handle topk_weights=None bias=None config=None previous_event=None "
    "async_finish=False allocate_on_comm_stream=False",
    "get_local_buffer_tensor": "dtype size=None offset=0 use_rdma_buffer=False",
    "low_latency_dispatch": "x topk_idx num_max_dispatch_tokens_per_rank num_experts "
    "cumulative_local_expert_recv_stats=None dispatch_wait_recv_cost_stats=None use_fp8=True "
    "round_scale=False use_ue8m0=False async_finish=False return_recv_hook=False",
    "low_latency_combine": "x topk_idx topk_weights handle use_logfmt=False zero_copy=False "
    "async_finish=False return_recv_hook=False out=None combine_wait_recv_cost_stats=None",
    "get_next_low_latency_combine_buffer": "handle",
    "clean_low_latency_buffer": "num_max_dispatch_tokens_per_rank hidden num_experts",
    "low_latency_update_mask_buffer": "rank_to_mask mask=False",
    "low_latency_query_mask_buffer": "mask_status",
    "low_latency_clean_mask_buffer": "",
}


@pytest.mark.parametrize("method", SIGNATURES)
def test_signatures_are_deep_eps(method):
    parameters = list(inspect.signature(getattr(ep.Buffer, method)).parameters.values())[1:]
    wanted = SIGNATURES[method].split()
    for parameter, text in zip(parameters, wanted):
        name, _, default = text.partition("=")
        assert parameter.name == name
        if default:
            assert parameter.default == eval(default)
    for parameter in parameters[len(wanted) :]:  # ours come after, by name only
        assert parameter.kind == inspect.Parameter.KEYWORD_ONLY


def test_topk_idx_t():
    assert ep.topk_idx_t == torch.int64
    assert isinstance(ep.Buffer.is_sm90_compiled(), bool)


def test_the_platform_variable(solo):
    """MSCCLPP_EP_PLATFORM is read once per process, so a process is started."""
    code = (
        "from mscclpp.ext import ep\n"
        "from ranks import ThreadComm\n"
        "print(ep.Buffer(None, 1 << 20, comm=ThreadComm(1).of(0)).device.type)\n"
    )
    folder = os.path.dirname(os.path.abspath(__file__))

    def run(value):
        path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "PYTHONPATH": path, "MSCCLPP_EP_PLATFORM": value}
        return subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
        )

    assert run("cpu").stdout.strip() == "cpu"
    bad = run("tpu")
    assert bad.returncode != 0 and "EpInvalidArgument" in bad.stderr and "tpu" in bad.stderr
    if solo.platform == "cpu" and not ep._cpp.has_cuda():
        assert "no CUDA kernels" in run("cuda").stderr


def test_errors_carry_a_code_and_survive_pickling():
    cases = {
        "invalidArgument": ValueError,
        "timeout": TimeoutError,
        "unsupported": NotImplementedError,
        "outOfMemory": MemoryError,
        "peerFailure": RuntimeError,
        "a new one": RuntimeError,
    }
    for code, also in cases.items():
        error = ep.errors.make_error(code, "the text, untouched", {"rank": 3})
        assert isinstance(error, ep.EpError) and isinstance(error, also)
        assert str(error) == "the text, untouched"
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.code) == (type(error), str(error), code)
        assert again.details == {"rank": 3}
