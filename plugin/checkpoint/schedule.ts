import cron from 'node-cron'
import { CdpError } from '../../core/errors/index.ts'
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

/** Runs `cut` at every tick of the interval; a run that takes longer than the interval skips ticks. */
export const scheduleCheckpoints = (everyMs: number, log: Logger, cut: () => Promise<void>): Disposable => {
  cron.setLogger({
    info: () => undefined,
    warn: (message) => log.warn(message),
    error: (message) => log.error(String(message)),
    debug: () => undefined,
  })
  const task = cron.schedule(cronExpression(everyMs), cut, { noOverlap: true })
  return { [Symbol.dispose]: () => void task.destroy() }
}
