"""Work that is done for all who wait for it: in order, each item once, an error for those alone whose work failed."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

from proxy.together import Together


class Work:
    """Work that waits until it may go on, and fails where a negative number is in it."""

    def __init__(self):
        self.done = []
        self.may_go_on = threading.Event()

    def __call__(self, items):
        assert self.may_go_on.wait(10)
        if min(items) < 0:
            raise OSError(f"{items}")
        self.done.append(items)


def test_what_comes_while_work_is_done_is_taken_in_one_piece_and_an_error_is_its_own():
    async def run():
        with ThreadPoolExecutor(1) as threads:
            work = Work()
            together = Together(work, threads)
            waiting = [together.add(0), together.add(1)]
            await asyncio.sleep(0)  # they are under way
            waiting += [together.add(2), together.add(-3)]
            abandoned = together.add(4)
            abandoned.cancel()
            work.may_go_on.set()
            await asyncio.wait(waiting)
            waiting += [together.add(5)]
            await together.close()
            return work.done, [future.result() for future in waiting]

    done, results = asyncio.run(run())
    assert done == [[0, 1], [5]]
    assert [str(result) for result in results] == ["None", "None", "[2, -3, 4]", "[2, -3, 4]", "None"]
