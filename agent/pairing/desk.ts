import { X509Certificate } from 'node:crypto'
import type { TLSSocket } from 'node:tls'
import { toCdpError } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import { formatToken, PairRequest, receiveMessage, sendMessage } from '../../core/pairing/index.ts'
import type { PairAnswer } from '../../core/pairing/index.ts'
import { fingerprintSha256, issueCertificate } from '../../core/pki/index.ts'
import type { Authority } from '../../core/pki/index.ts'
import { PairedSites } from './sites.ts'
import type { PairedSite } from './sites.ts'
import { TokenBook } from './tokens.ts'
import type { Redemption } from './tokens.ts'

export type PairingDeskOptions = {
  authority: Authority
  /** The agent's own site id. */
  agentSiteId: string
  /** Holds pairing-tokens.json and sites/; private (0700). */
  directory: string
  log: Logger
  /** After a site was paired and stored. */
  onPaired?: (site: PairedSite, replaced: boolean) => void
  /** For the whole conversation with one site. */
  deadlineMs?: number
  nowUnixMs?: () => number
}

export type PairingDesk = {
  readonly sites: PairedSites
  /** A token that pairs one site; 15 minutes unless `validForMs` says otherwise. Throws BAD_INPUT, CONFLICT, IO. */
  createToken(options: { host: string; port: number; validForMs?: number }): Promise<{ token: string; expiresAtUnixMs: number }>
  /** For listenSecure's onPair. */
  handle(socket: TLSSocket): void
  /** Ends the conversations under way. */
  [Symbol.asyncDispose](): Promise<void>
}

const defaultValidForMs = 15 * 60_000
const clientValidForMs = 3650 * 86_400_000
const maxConversations = 8

const refusals: Record<Exclude<Redemption, 'accepted'>, string> = {
  unknown: 'the agent does not know this token',
  expired: 'this token has expired',
  used: 'this token was used already',
  void: 'this token is void after too many wrong tries',
}

export const createPairingDesk = async (options: PairingDeskOptions): Promise<PairingDesk> => {
  const { authority, agentSiteId, log } = options
  const nowUnixMs = options.nowUnixMs ?? Date.now
  const tokens = await TokenBook.open(options.directory, nowUnixMs)
  if (tokens.wasDamaged) log.warn('the file of pairing tokens is damaged: tokens that were open are void', { directory: options.directory })
  const sites = await PairedSites.open(options.directory)
  const conversations = new Map<TLSSocket, Promise<void>>()
  const closing = new AbortController()

  const answer = async (request: PairRequest, address: string): Promise<PairAnswer> => {
    const redemption = await tokens.redeem(request.secret)
    if (redemption !== 'accepted') {
      log.warn('pairing refused', { reason: redemption, address })
      return { ok: false, message: refusals[redemption], hint: 'Make a new one at the recovery site: pvecdp pair token' }
    }
    const certificatePem = await issueCertificate(authority, {
      commonName: request.siteId,
      csrPem: request.csrPem,
      usage: 'client',
      validForMs: clientValidForMs,
      nowUnixMs,
    })
    const site: PairedSite = {
      siteId: request.siteId,
      fingerprintSha256: fingerprintSha256(certificatePem),
      pairedAtUnixMs: nowUnixMs(),
      pairedFromAddress: address,
      certificateEndsAtUnixMs: new X509Certificate(certificatePem).validToDate.getTime(),
    }
    const replaced = await sites.record(site)
    log.info(replaced ? 'site paired again' : 'site paired', { siteId: site.siteId, address })
    options.onPaired?.(site, replaced)
    return { ok: true, siteId: request.siteId, agentSiteId, certificatePem, authorityPem: authority.certificatePem }
  }

  const converse = async (socket: TLSSocket): Promise<void> => {
    const address = socket.remoteAddress ?? 'unknown'
    try {
      const request = await receiveMessage(socket, PairRequest, { deadlineMs: options.deadlineMs ?? 10_000, signal: closing.signal })
      // A site reads the chain over a connection of its own before it says anything.
      if (request === undefined) return
      sendMessage(socket, await answer(request, address))
      socket.end()
    } catch (error) {
      const failure = toCdpError(error)
      log.warn('pairing failed', { address, error: failure })
      if (failure.code === 'BAD_INPUT') sendMessage(socket, { ok: false, message: failure.message } satisfies PairAnswer)
      socket.end()
    } finally {
      socket.setTimeout(5000, () => socket.destroy()).resume()
    }
  }

  return {
    sites,
    createToken: async ({ host, port, validForMs }) => {
      const caFingerprintSha256 = fingerprintSha256(authority.certificatePem)
      // Checked with a placeholder first: a bad host must not leave an open token behind.
      formatToken({ host, port, caFingerprintSha256, secret: 'x'.repeat(43) })
      const { secret, expiresAtUnixMs } = await tokens.create(validForMs ?? defaultValidForMs)
      log.info('pairing token made', { host, port, expiresAtUnixMs })
      return { token: formatToken({ host, port, caFingerprintSha256, secret }), expiresAtUnixMs }
    },
    handle: (socket) => {
      if (conversations.size >= maxConversations || closing.signal.aborted) {
        log.warn('pairing refused', { reason: 'too many at once', address: socket.remoteAddress })
        socket.destroy()
        return
      }
      socket.on('error', (error) => log.debug('pairing connection broke', { error }))
      conversations.set(
        socket,
        converse(socket).finally(() => conversations.delete(socket)),
      )
    },
    [Symbol.asyncDispose]: async () => {
      closing.abort()
      await Promise.all(conversations.values())
    },
  }
}
