"""Whether a page that was read says anything: valid pages with nothing inside are failures.

Short pages are looked at sentence by sentence. A page fails if hardly anything is left of it
without the sentences of checks for humans, error pages, and requests for cookies or scripts.
"""

import re

import regex

_SHORT = 4000  # characters; a longer page has text of its own
# A page that says one of these has at least so many letters beside it, else it is only that.
_REFUSAL_LETTERS = 120
_NOTICE_LETTERS = 25

_REFUSAL = regex.compile(
    r"^\W*just a moment\W*$|checking (?:your browser|if the site connection)"
    r"|you(?:.re| are) (?:a |not a )?human|robot or human|are you a (?:robot|human)"
    r"|not a (?:ro)?bot\b"
    r"|enable javascript and cookies|review the security of your connection|security checkpoint"
    r"|(?:verify|verifying|check|checking) your browser"
    r"|performance (?:&|and) security by|\bray id\b|\battention required|\bincident id\b"
    r"|(?:complete|solve|pass|enter|requir\w+) (?:the |a |this )?(?:security check|captcha)"
    r"|captcha (?:check|verification|required)|human verification|^\W*security check\W*$"
    r"|bot (?:detection|verification)|request unsuccessful|ddos protection by"
    r"|unusual (?:traffic|activity) from your|access (?:to this \S+ )?(?:has been |is |was )?denied"
    r"|(?:you have|have i|access has|you were|ip \S+ has) (?:been )?blocked|pardon our interruption"
    r"|security (?:service|solution) to protect itself|triggered the security solution"
    r"|could trigger this block|you are unable to access|email the site owner"
    r"|(?:do not|don.t) have permission to (?:access|view)"
    r"|made us think (?:that )?you (?:were|are) a bot|^\W*(?:error )?(?:40[134]|429|50[0234])\W*$"
    r"|^\W*(?:error |http )?(?:40[134]|429|50[0234])[\W\d]{0,4}(?:forbidden|unauthori.ed|not found"
    r"|too many|internal|bad gateway|service|gateway|access|page|error)"
    r"|^\W*(?:forbidden|page not found|not found|error|bad gateway|service unavailable)\W*$"
    r"|page (?:that )?(?:you.re|you are|you were|you) (?:looking for|requested)"
    r"|before you continue to (?:google|youtube)|the yahoo family of brands"
    r"|nur einen moment|einen moment,? bitte|sicherheitsüberprüfung|zugriff verweigert"
    r"|^\W*un instant\W*$|accès refusé|vérifi\w+ que vous êtes|^\W*un momento\W*$|acceso denegado"
    r"|^\W*um momento\W*$|acesso negado|verifica\w* (?:que|se) (?:usted|você) (?:es|é)"
    r"|^\W*подождите|доступ (?:запрещ|ограничен)|вы не робот|проверк\w+ (?:браузера|безопасности)"
    r"|^\W*请稍[候等]|人机验证|安全验证|完成验证|正在验证|访问(?:被拒绝|受限)|输入验证码|輸入驗證碼"
    r"|拒絕存取|^\W*(?:しばらく|少々)お待ちください|ロボットではありません|アクセスが拒否"
    r"|^\W*잠시만 기다|로봇이 아닙니다|접근이 (?:거부|차단)",
    regex.IGNORECASE,
)
_NOTICE = regex.compile(
    r"\b(?:we|our|us|you|your|this|site|website|accept|allow|by|please)\b.{0,99}\bcookies?\b"
    r"|\bcookies?\b.{0,40}\b(?:policy|settings|preferences|consent|notice)\b"
    r"|(?:enable|activ\w+|aktiv\w+|turn on|requires?|need\w*) .{0,60}javascript"
    r"|javascript .{0,40}(?:enabled|disabled|required|supported|turned off|available)"
    r"|your (?:privacy|consent|choices)|privacy policy|personali[sz]ed (?:ads|content)"
    r"|legitimate interest|(?:our|and) (?:\d+ )?partners"
    r"|^\W*(?:accept|reject|allow|agree|manage|more)(?: \w+){0,3}\W*$"
    r"|^\W*(?:sign|log) (?:in|up|out)\W*$|^\W*(?:skip to \w+(?: content)?|menu|search|share)\W*$"
    r"|terms of (?:use|service)|^\W*before you continue|all rights reserved|^\W*loading\W*$"
    r"|^\W*please wait|^\W*redirecting|datenschutz|zustimmen|einwilligung|confidentialité"
    r"|隐私政策|クッキー|쿠키|接受所有|файл\w* cookie",
    regex.IGNORECASE,
)
# A full stop inside a word ends no sentence.
_SENTENCE = re.compile(
    "[^\n.!?\u2026\u3002\uff01\uff1f]+(?:[.](?=\\w)[^\n.!?\u2026\u3002\uff01\uff1f]+)*"
)
_IMAGE = re.compile(r"!\[[^\]\n]{0,500}\]\([^)\s]{0,500}\)")
_ADDRESS = re.compile(r"\]\([^)\s]{0,500}\)|https?://\S{1,500}|\bwww\.\S{1,300}")
_LETTER = re.compile(r"[^\W\d_]")
_WIDE = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]")


def nothing_said(page: str) -> str | None:
    """Return why a page (plain text or markdown) says nothing, or None if it says something."""
    if len(page) > _SHORT:
        return None if _LETTER.search(page) else "no text in it"
    text = _ADDRESS.sub(" ", _IMAGE.sub(" ", page))
    refusals = notices = removed = 0
    left = []
    for sentence in _SENTENCE.findall(text):
        refused = bool(_REFUSAL.search(sentence))
        if refused or _NOTICE.search(sentence):
            refusals, notices = refusals + refused, notices + (not refused)
            removed += _letters(sentence)
        else:
            left.append(sentence)
    letters = _letters(" ".join(left))
    if refusals and letters < _REFUSAL_LETTERS:
        return "a check for humans, or an error page"
    if notices and (letters < _NOTICE_LETTERS or (notices > 2 and letters * 2 < removed)):
        return "only a request for cookies, scripts or consent"
    return None if letters else "no text in it"


def _letters(text: str) -> int:
    """Count letters; those of Chinese, Japanese and Korean say as much as four."""
    return len(_LETTER.findall(text)) + 3 * len(_WIDE.findall(text))
