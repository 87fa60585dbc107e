import type { Duplex } from 'node:stream'
import { CdpError, errorMessage, toCdpError } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import { NodeMessageParser, encodeMessage, readRequest } from './wire.ts'
import type { NodeHandlers, NodeReply, NodeRequest } from './wire.ts'

const MAX_UNDER_WAY = 256

/** Answers the requests of one other node, until it goes away. Several may be under way: a commit does not wait behind a status. */
export const serveNode = (socket: Duplex, from: string, handlers: NodeHandlers, log: Logger): void => {
  let underWay = 0
  const send = (reply: NodeReply): void => {
    if (!socket.destroyed) socket.write(encodeMessage(reply))
  }
  const fail = (id: number, error: unknown): void => {
    const { code, message, hint } = toCdpError(error)
    send({ id, error: { code, message, ...(hint === undefined ? {} : { hint }) } })
  }
  const answer = async (request: NodeRequest): Promise<void> => {
    underWay++
    try {
      send({ id: request.id, answer: await handle(handlers, request, from) })
    } catch (error) {
      fail(request.id, error)
    } finally {
      underWay--
    }
  }
  const parser = new NodeMessageParser((message) => {
    if (underWay >= MAX_UNDER_WAY) throw new CdpError('STREAM_PROTOCOL', 'another node asks too much at once')
    let request: NodeRequest
    try {
      request = readRequest(message)
    } catch (error) {
      const id = error instanceof CdpError ? error.context['id'] : undefined
      if (typeof id !== 'number') throw error
      return fail(id, error)
    }
    void answer(request)
  })
  socket.on('data', (chunk: Buffer) => {
    try {
      parser.push(chunk)
    } catch (error) {
      log.warn('another node broke the protocol', { node: from, error: errorMessage(error) })
      socket.destroy()
    }
  })
  socket.on('error', (error) => log.debug('the connection from another node broke', { node: from, error: errorMessage(error) }))
}

const handle = (handlers: NodeHandlers, { name, ask }: NodeRequest, from: string): Promise<unknown> => {
  switch (name) {
    case 'hold': return handlers.hold(ask, from)
    case 'commit': return handlers.commit(ask, from)
    case 'release': return handlers.release(ask, from)
    case 'status': return handlers.status(ask, from)
    case 'tag': return handlers.tag(ask, from)
  }
}
