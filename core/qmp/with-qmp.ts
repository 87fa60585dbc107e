import { setTimeout as delay } from 'node:timers/promises'
import { CdpError } from '../errors/index.ts'
import { QmpClient } from './qmp-client.ts'
import type { QmpConnectOptions } from './qmp-client.ts'

const retryAfterMs = 20

/**
 * Opens the socket, runs `work`, closes the socket whatever happens. While another client is served the connection waits in
 * the socket's queue; when the queue is full it tries again, all within `deadlineMs` (default 5000), which bounds the way to
 * the greeting, not `work`.
 * @throws CdpError as QmpClient.connect, and whatever `work` throws.
 */
export const withQmp = async <T>(socketPath: string, options: QmpConnectOptions, work: (qmp: QmpClient) => Promise<T>): Promise<T> => {
  const deadlineMs = options.deadlineMs ?? 5000
  const endsAtMs = performance.now() + deadlineMs
  await using qmp = await connectInLine(socketPath, options, endsAtMs)
  return await work(qmp)
}

const connectInLine = async (socketPath: string, options: QmpConnectOptions, endsAtMs: number): Promise<QmpClient> => {
  while (true) {
    try {
      return await QmpClient.connect(socketPath, { ...options, deadlineMs: Math.max(1, endsAtMs - performance.now()) })
    } catch (error) {
      const queueIsFull = error instanceof CdpError && error.code === 'CONFLICT'
      if (!queueIsFull || performance.now() + retryAfterMs >= endsAtMs) throw error
      await delay(retryAfterMs)
    }
  }
}
