import cron from 'node-cron'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'

/**
 * The cron expression (with seconds) of an interval.
 * @throws CdpError BAD_INPUT for one that does not divide a minute or an hour evenly
 */
export const cronExpression = (everyMs: number): string => {
  const seconds = everyMs / 1000
  if (Number.isInteger(seconds) && seconds >= 1 && seconds <= 60 && 60 % seconds === 0) return seconds === 60 ? '0 * * * * *' : `*/${seconds} * * * * *`
  const minutes = seconds / 60
  if (Number.isInteger(minutes) && minutes >= 1 && minutes <= 60 && 60 % minutes === 0) return minutes === 60 ? '0 0 * * * *' : `0 */${minutes} * * * *`
  throw new CdpError('BAD_INPUT', `checkpoints cannot be cut every ${seconds} s`, { hint: 'Choose seconds that divide a minute (1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60) or minutes that divide an hour.' })
}

const SECOND_MS = 1000
/** How many seconds are looked at after a while in which nothing ran, or a wall clock that stepped forward. */
const MOST_SECONDS = 60

/**
 * Runs `cut` at every tick of the interval; a run that takes longer than the interval skips ticks. node-cron says which seconds of the wall clock are ticks; it does not
 * wait for them: after a step back its timer would be silent until the clock is there again, after a step forward it would walk every missed tick, 0.1 ms each,
 * with nothing else done in this thread.
 */
export const scheduleCheckpoints = (everyMs: number, log: Logger, cut: () => Promise<void>): Disposable => {
  const pattern = cron.createTask(cronExpression(everyMs), () => undefined)
  let isCutting = false
  const run = async (): Promise<void> => {
    if (isCutting) return
    isCutting = true
    try {
      await cut()
    } catch (error) {
      log.error('a checkpoint could not be cut', { error: errorMessage(error) })
    } finally {
      isCutting = false
    }
  }
  let last = Math.floor(Date.now() / SECOND_MS)
  let timer: NodeJS.Timeout
  const wait = (): void => void (timer = setTimeout(look, SECOND_MS - (Date.now() % SECOND_MS)))
  const look = (): void => {
    const now = Math.floor(Date.now() / SECOND_MS)
    const first = now > last ? Math.max(last + 1, now - MOST_SECONDS) : now
    // A timer may be early: the same second again is none.
    const isTick = now !== last && Array.from({ length: now - first + 1 }, (_, n) => first + n).some((second) => pattern.match(new Date(second * SECOND_MS)))
    last = now
    if (isTick) void run()
    wait()
  }
  wait()
  return {
    [Symbol.dispose]: () => {
      clearTimeout(timer)
      void pattern.destroy()
    },
  }
}
