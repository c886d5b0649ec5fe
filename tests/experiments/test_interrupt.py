import os
import signal
import threading

import pytest

from experiments.interrupt import Interrupt, Interrupted

BOTH = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def handlers():
    """The handlers of this process, which must be there again after each test."""
    before = [signal.getsignal(number) for number in BOTH]
    yield before
    after = [signal.getsignal(number) for number in BOTH]
    for number, handler in zip(BOTH, before, strict=True):
        signal.signal(number, handler)
    assert after == before


@pytest.mark.parametrize("number", BOTH)
def test_the_first_signal_sets_a_flag(number):
    with Interrupt() as stop:
        assert not stop()
        signal.raise_signal(number)
        assert stop() and stop()


@pytest.mark.parametrize("numbers", [BOTH, BOTH[::-1], BOTH[:1] * 2], ids=str)
def test_the_second_signal_ends_the_process(numbers):
    with pytest.raises(KeyboardInterrupt) as error, Interrupt() as stop:
        signal.raise_signal(numbers[0])
        assert stop()
        signal.raise_signal(numbers[1])
        pytest.fail("the second signal did nothing")
    assert not isinstance(error.value, Interrupted)


def test_handlers_are_taken_over_and_given_back_after_an_error(handlers):
    with pytest.raises(ValueError, match="inside"), Interrupt():
        assert [signal.getsignal(number) for number in BOTH] != handlers
        raise ValueError("inside")
    assert [signal.getsignal(number) for number in BOTH] == handlers


def test_other_handlers_than_the_usual_ones_are_given_back():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with Interrupt() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop() and not seen
        signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_only_the_main_thread_may():
    found = []

    def enter():
        try:
            with Interrupt():
                pass
        except ValueError as error:
            found.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert len(found) == 1 and "main thread" in found[0]


def test_interrupted_is_no_ordinary_exception():
    # So that what catches Exception does not go on.
    assert not issubclass(Interrupted, Exception)
    assert issubclass(Interrupted, KeyboardInterrupt)
