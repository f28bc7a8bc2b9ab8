"""Reading ahead: what an iterator gives next is made in a background thread while the present item is used."""

from concurrent.futures import ThreadPoolExecutor

_END = object()


def ahead(iterator):
    """The items of ``iterator``, each begun when the one before is handed out; two exist at a time."""
    iterator = iter(iterator)
    with ThreadPoolExecutor(1, "fastxent-reads-ahead") as pool:
        coming = pool.submit(next, iterator, _END)
        while (item := coming.result()) is not _END:
            coming = pool.submit(next, iterator, _END)
            yield item
            del item  # or it would live until the next one is there
