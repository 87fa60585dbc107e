import { readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { Type } from '@sinclair/typebox'
import type { Static } from '@sinclair/typebox'
import { Value } from '@sinclair/typebox/value'
import { CdpError } from '../../core/errors/index.ts'
import { ensurePrivateDirectory, readPrivateFile, removePrivateFile, writePrivateFile } from '../../core/pki/index.ts'

const PairedSite = Type.Object({
  siteId: Type.String({ pattern: '^[0-9a-f-]{36}$' }),
  /** SHA-256 of the one certificate that is accepted from this site. */
  fingerprintSha256: Type.String({ pattern: '^[0-9a-f]{64}$' }),
  pairedAtUnixMs: Type.Number(),
  pairedFromAddress: Type.String(),
  certificateEndsAtUnixMs: Type.Number(),
})
export type PairedSite = Static<typeof PairedSite>

const maxSites = 1000

/** The register of paired sites: `<directory>/sites/<site id>.json`, each replaced whole. */
export class PairedSites {
  readonly #directory: string
  readonly #sites: Map<string, PairedSite>

  private constructor(directory: string, sites: Map<string, PairedSite>) {
    this.#directory = directory
    this.#sites = sites
  }

  /** Throws IO for a damaged entry: a site that silently is not paired any more would be worse. */
  static async open(directory: string): Promise<PairedSites> {
    const own = join(directory, 'sites')
    await ensurePrivateDirectory(own)
    const sites = new Map<string, PairedSite>()
    for (const name of (await readdir(own)).filter((entry) => /^[0-9a-f-]{36}\.json$/.test(entry))) {
      const path = join(own, name)
      const text = await readPrivateFile(path)
      let stored: unknown
      try {
        stored = JSON.parse(text ?? '')
      } catch {
        stored = undefined
      }
      if (!Value.Check(PairedSite, stored) || `${stored.siteId}.json` !== name) {
        throw new CdpError('IO', `${path} is damaged`, { hint: 'Restore the file from a backup, or remove it and pair that site again.', context: { path } })
      }
      sites.set(stored.siteId, stored)
    }
    return new PairedSites(own, sites)
  }

  list(): PairedSite[] {
    return [...this.#sites.values()]
  }

  get(siteId: string): PairedSite | undefined {
    return this.#sites.get(siteId)
  }

  /** For listenSecure: why a genuine certificate is not accepted, or undefined. */
  admit(peer: { siteId: string; fingerprintSha256: string }): string | undefined {
    const site = this.#sites.get(peer.siteId)
    if (site === undefined) return 'this site is not paired'
    return site.fingerprintSha256 === peer.fingerprintSha256 ? undefined : 'this certificate was replaced by a newer pairing'
  }

  /** True if it replaced an earlier pairing of the same site. */
  async record(site: PairedSite): Promise<boolean> {
    const replaced = this.#sites.has(site.siteId)
    if (!replaced && this.#sites.size >= maxSites) throw new CdpError('CONFLICT', `${maxSites} sites are paired already`)
    await writePrivateFile(join(this.#directory, `${site.siteId}.json`), `${JSON.stringify(site)}\n`)
    this.#sites.set(site.siteId, site)
    return replaced
  }

  /** Its certificate is refused from now on; open streams are the caller's to end. False if it was not paired. */
  async remove(siteId: string): Promise<boolean> {
    if (!this.#sites.has(siteId)) return false
    await removePrivateFile(join(this.#directory, `${siteId}.json`))
    return this.#sites.delete(siteId)
  }
}
