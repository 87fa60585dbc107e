/** What may wait in any case: without it nothing would begin. */
const FLOOR_BYTES = 1024 * 1024
/** The line's worth of so much time may wait beyond that. */
const AHEAD_MS = 1_000
const SAMPLE_MS = 50

/**
 * Holds a copy back that runs beside live checkpoints: a checkpoint is valid when everything recorded before it is durable, so no more may wait for the agent than
 * it has made durable in the last second.
 */
export class CopyPace {
  #samples: { atMs: number; durableBytes: number }[] = []

  /**
   * @param waitingBytes recorded and not durable
   * @param durableBytes that became durable so far; only grows
   * @param nowMs monotonic
   */
  hasRoom(waitingBytes: number, durableBytes: number, nowMs: number): boolean {
    const samples = this.#samples
    if (samples.length === 0 || nowMs - samples[samples.length - 1].atMs >= SAMPLE_MS) samples.push({ atMs: nowMs, durableBytes })
    while (samples.length > 1 && nowMs - samples[1].atMs >= AHEAD_MS) samples.shift()
    const [oldest] = samples
    const aheadBytes = ((durableBytes - oldest.durableBytes) * AHEAD_MS) / Math.max(AHEAD_MS, nowMs - oldest.atMs)
    return waitingBytes < FLOOR_BYTES + aheadBytes
  }
}
