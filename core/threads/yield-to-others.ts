import { readlinkSync } from 'node:fs'
import { getPriority, setPriority } from 'node:os'

/** A third of the processor's time against a thread that needs all of it; all of it otherwise. */
const BACKGROUND_NICENESS = 5

/**
 * Lets the calling thread stand back when the processors are busy: what can wait (sealing, merging) must not slow what somebody waits for.
 * On Linux a niceness belongs to a thread (setpriority(2), "C library/kernel differences"), and /proc/thread-self names the caller's.
 * @returns false where the system refuses; the thread then goes on as it was
 */
export const yieldToOthers = (): boolean => {
  try {
    const threadId = Number(readlinkSync('/proc/thread-self').split('/').at(-1))
    setPriority(threadId, Math.max(getPriority(threadId), BACKGROUND_NICENESS))
    return true
  } catch {
    return false
  }
}
