// Work in parallel on the threads that torch keeps for it.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>

namespace native {

// Runs body(data) on `threads` threads at once, as the compilers' OpenMP does.
using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// torch's OpenMP, wherever its library lies: a second one of our own would compete with it for the cores.
// Null where there is none (before torch is imported, or on macOS); then one thread does all the work.
inline Parallel torch_parallel() {
    static const auto found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
}

// Calls work(task) for all tasks in [0, tasks), each once, in unspecified order; results must not depend on which
// thread runs a task.
template <class Work>
void for_each_task(long tasks, int threads, const Work& work) {
    struct Shared {
        std::atomic<long> next;
        long tasks;
        const Work& work;
    } shared{{0}, tasks, work};
    const auto run = [](void* data) {
        Shared& all = *static_cast<Shared*>(data);
        for (long task; (task = all.next.fetch_add(1, std::memory_order_relaxed)) < all.tasks;) all.work(task);
    };
    threads = static_cast<int>(std::min<long>(threads, tasks));
    if (threads > 1 && torch_parallel())
        torch_parallel()(run, &shared, threads, 0);
    else
        run(&shared);
}

// Calls work(begin, end) for pieces of [0, rows), of about `most` elements when a row has `width`.
template <class Work>
void for_each_piece(long rows, long width, long most, int threads, const Work& work) {
    const long step = std::max(1L, most / std::max(1L, width));
    for_each_task((rows + step - 1) / step, threads, [&](long task) {
        work(task * step, std::min(rows, (task + 1) * step));
    });
}

}  // namespace native
