import { CdpError } from '../../core/errors/index.ts'
import type { LabDaemon } from '../lab/sites.ts'

type Message = { id?: number; method?: string; params?: { sessionId: string; message?: string; workerInfo?: { title: string } }; error?: { message: string } }

/**
 * Makes a worker thread of a daemon spin for ever, from outside: through the inspector that node was started with (--inspect=127.0.0.1:0).
 * Resolves when the thread has been told to.
 * @param title of the worker, as its threads are named: 'capture-101'
 */
export const hangWorker = async (daemon: LabDaemon, title: string): Promise<void> => {
  const url = daemon.log().match(/ws:\/\/127\.0\.0\.1:\d+\/[0-9a-f-]+/g)?.at(-1)
  if (url === undefined) throw new CdpError('NOT_FOUND', `${daemon.name} was not started with --inspect`)
  const socket = new WebSocket(url)
  const { promise, resolve, reject } = Promise.withResolvers<void>()
  const timer = setTimeout(() => reject(new CdpError('TIMEOUT', `no worker ${title} answers the inspector`)), 10_000)
  const seen: string[] = []
  socket.addEventListener('open', () => socket.send(JSON.stringify({ id: 1, method: 'NodeWorker.enable', params: { waitForDebuggerOnStart: false } })))
  socket.addEventListener('error', () => reject(new CdpError('UNREACHABLE', `no inspector at ${url}`)))
  socket.addEventListener('message', ({ data }) => {
    const { method, params, error } = JSON.parse(String(data)) as Message
    if (error !== undefined) reject(new CdpError('INTERNAL', error.message))
    if (method === 'NodeWorker.attachedToWorker') {
      seen.push(params?.workerInfo?.title ?? '')
      if (params?.workerInfo?.title.includes(title) !== true) return
      const evaluate = { id: 1, method: 'Runtime.evaluate', params: { expression: 'setTimeout(() => { for (;;); }, 0)' } }
      socket.send(JSON.stringify({ id: 2, method: 'NodeWorker.sendMessageToWorker', params: { sessionId: params.sessionId, message: JSON.stringify(evaluate) } }))
    }
    if (method === 'NodeWorker.receivedMessageFromWorker') resolve()
  })
  try {
    await promise
  } catch (error) {
    throw error instanceof CdpError && error.code === 'TIMEOUT' ? new CdpError('TIMEOUT', `${error.message}; there are: ${seen.join(', ')}`) : error
  } finally {
    clearTimeout(timer)
    socket.close()
  }
}
